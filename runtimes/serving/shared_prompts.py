"""Several answers to one prompt: one of them reads it, and the others wait until the prefix cache has it."""

from __future__ import annotations

from qwen_export.runtimes.serving.served_call import ServedCall


class SharedPrompts:
    """By `Request.group`: the call that reads the prompt, and those that wait for it."""

    def __init__(self) -> None:
        self._groups: dict[int, tuple[ServedCall, list[ServedCall]]] = {}

    def holds(self, call: ServedCall) -> bool:
        """Whether a call that arrives has to wait for another one of its group."""
        group = call.request.group
        if group is None:
            return False
        reader, waiting = self._groups.setdefault(id(group), (call, []))
        if reader is call:
            return False
        waiting.append(call)
        return True

    def forget(self, call: ServedCall) -> bool:
        """A call has ended; returns whether it was waiting."""
        for _, waiting in self._groups.values():
            if call in waiting:
                waiting.remove(call)
                return True
        return False

    def released(self) -> list[ServedCall]:
        """Those that need not wait any longer: their prompt was read, or who read it has ended."""
        done = {key for key, (reader, _) in self._groups.items() if reader.statistics.finish or len(reader.text) > len(reader.ids)}
        return [call for key in done for call in self._groups.pop(key)[1]]
