"""Choice of strategy: the memory and the time that each layout would take, without running it.

:mod:`.model` describes a model (:mod:`.published`: those by name), :mod:`.job` a step, :mod:`.hardware` the ranks
(stated, or by :mod:`.measure`), :mod:`.operations` the computations and messages of a step; :mod:`.memory` and
:mod:`.cost` turn them into bytes and seconds, and :mod:`.search` ranks every layout or says why it cannot run.
"""
