"""What tests of bulk copies, matrix instructions and a Gluon kernel in the emulator share."""
