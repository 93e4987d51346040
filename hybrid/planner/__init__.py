"""Choice of strategy: what each layout would cost in memory and time, without running it.

:mod:`.model` says what the model is, :mod:`.job` what a step does, :mod:`.hardware` what the ranks are (stated, or by
:mod:`.measure`), :mod:`.operations` what a step computes and sends; :mod:`.memory` and :mod:`.cost` turn that into
bytes and seconds, and :mod:`.search` ranks every layout or says why not.
"""
