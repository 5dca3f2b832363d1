"""Dynamic training: MD with the current potential requests a label when its error is too large, and continues.

``run`` is the engine (`ubmd.learning.dynamic.engine`); what it leaves behind is described in
`ubmd.runs.dynamic_history`.
"""
