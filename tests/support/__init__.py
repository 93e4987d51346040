"""What tests share: inputs, cases, models, fresh processes. ``ranks`` holds what ranks run, ``emulator`` its tests' own."""
