"""What tests share: inputs, cases, models, fresh processes.

``ranks`` holds what ranks run, ``emulator`` what only the emulator's tests share.
"""
