"""What tests share: inputs, cases, models, fresh processes. ``ranks`` holds what ranks run, ``emulator`` what tests of it share."""
