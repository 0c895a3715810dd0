"""Figures for Prometheus, under the names that vLLM gave them: dashboards and load generators read these.

Each application has a registry of its own. What the engine counts is read from it when the figures are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from qwen_export.runtimes.server.answer_choices import Choice
from qwen_export.runtimes.serving.answering import Answering
from qwen_export.runtimes.serving.engine_statistics import EngineStatistics

_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Until the first token.", _FIRST),
    "inter_token_latency_seconds": ("Between two steps that gave an answer tokens.", _BETWEEN),
    "request_time_per_output_token_seconds": ("Seconds per token after the first.", _BETWEEN),
    "e2e_request_latency_seconds": ("Of a whole answer.", _LATENCY),
    "request_queue_time_seconds": ("Until a slot was free.", _LATENCY),
    "request_prefill_time_seconds": ("From the slot to the first token.", _LATENCY),
    "request_decode_time_seconds": ("From the first token to the last.", _LATENCY),
    "request_inference_time_seconds": ("From the slot to the last token.", _LATENCY),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens of an answer.", _TOKENS),
    "request_params_max_tokens": ("The most tokens that an answer may have.", _TOKENS),
    "request_params_n": ("Answers of a request.", (1, 2, 5, 10, 20)),
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "prompt_tokens_cached": "Those of them that were not read again.",
    "generation_tokens": "Tokens of answers.",
    "prefix_cache_queries": "Tokens that were looked up in the prefix cache.",
    "prefix_cache_hits": "Tokens that it had.",
    "spec_decode_num_drafts": "Rounds with a draft.",
    "spec_decode_num_draft_tokens": "Tokens drafted.",
    "spec_decode_num_accepted_tokens": "Tokens drafted and kept.",
}
_LABELS = ("model_name", "engine")
_FINISHES = {"stop": "stop", "length": "length", "overflow": "length", "error": "error"}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ServingMetrics:
    """Watches choices from the event loop."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._labels = ("", "0")
        self._watches = False

    def watch(self, engine: Answering, model: str) -> None:
        """Begin to count. Figures of one engine have its number as label; what answers are counted by has 0, whichever made them."""
        self._watches, self._labels = True, (model, "0")
        one = self.registry
        self._histograms = {
            name: Histogram(f"vllm:{name}", text, _LABELS, registry=one, buckets=buckets).labels(*self._labels)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._counters = {
            name: Counter(f"vllm:{name}", text, _LABELS, registry=one).labels(*self._labels) for name, text in _COUNTERS.items()
        }
        self._first = self._histograms["time_to_first_token_seconds"].observe
        self._between = self._histograms["inter_token_latency_seconds"].observe
        self._success = Counter("vllm:request_success", "Answers by their end.", (*_LABELS, "finished_reason"), registry=one)
        self._rejections = Counter("vllm:admission_rejections", "Requests that were refused.", (*_LABELS, "reason"), registry=one)
        self._by_place = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Drafts kept, by their place.", (*_LABELS, "position"), registry=one
        )
        one.register(_EngineFigures(engine.figures, model))

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def rejected(self, reason: str) -> None:
        if self._watches:
            self._rejections.labels(*self._labels, reason).inc()

    def arrived(self, choice: Choice, tokens: int, gap_s: float) -> None:
        if choice.tokens:
            self._between(gap_s)
        else:
            self._first(choice.statistics.first_token_s)

    def ended(self, choice: Choice) -> None:
        numbers, count = choice.statistics, len(choice.tokens)
        for name, total in (
            ("prompt_tokens", numbers.prompt_tokens),
            ("prompt_tokens_cached", numbers.reused_tokens),
            ("generation_tokens", count),
            ("prefix_cache_queries", numbers.prompt_tokens),
            ("prefix_cache_hits", numbers.reused_tokens),
            ("spec_decode_num_drafts", numbers.speculation.drafted[0] if numbers.speculation.drafted else 0),
            ("spec_decode_num_draft_tokens", sum(numbers.speculation.drafted)),
            ("spec_decode_num_accepted_tokens", sum(numbers.speculation.accepted)),
        ):
            self._counters[name].inc(total)
        for place, kept in enumerate(numbers.speculation.accepted):
            self._by_place.labels(*self._labels, str(place)).inc(kept)
        self._success.labels(*self._labels, _FINISHES.get(numbers.finish, "abort")).inc()
        observed: dict[str, float] = {
            "request_prompt_tokens": numbers.prompt_tokens,
            "request_generation_tokens": count,
            "request_params_max_tokens": choice.prepared.request.max_new_tokens or 0,
            "e2e_request_latency_seconds": numbers.total_s,
            "request_queue_time_seconds": numbers.queued_s,
        }
        if count:
            decoding = numbers.total_s - numbers.first_token_s
            observed |= {
                "request_prefill_time_seconds": max(0.0, numbers.first_token_s - numbers.queued_s),
                "request_decode_time_seconds": decoding,
                "request_inference_time_seconds": max(0.0, numbers.total_s - numbers.queued_s),
            }
            if count > 1:
                observed["request_time_per_output_token_seconds"] = decoding / (count - 1)
        for name, value in observed.items():
            self._histograms[name].observe(value)

    def asked(self, n: int) -> None:
        self._histograms["request_params_n"].observe(n)


class _EngineFigures:
    """What the engines know, read when it is asked for."""

    def __init__(self, engines: Sequence[EngineStatistics], model: str) -> None:
        self._engines, self._model = engines, model

    def collect(self) -> Iterable[Any]:
        gauges: tuple[tuple[str, str, Callable[[EngineStatistics], float]], ...] = (
            ("vllm:num_requests_running", "Answers that have a slot.", lambda numbers: numbers.running),
            ("vllm:num_requests_waiting", "Answers that wait for one.", lambda numbers: numbers.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the memory for sequences that is in use, 0 to 1.", _cache_share),
            ("qwen_slots", "Answers that run at once.", lambda numbers: numbers.slots),
            ("qwen_snapshots", "Beginnings of prompts that are kept.", lambda numbers: numbers.prefix.points),
            ("qwen_snapshots_bytes", "Their memory.", lambda numbers: numbers.prefix.bytes),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            for number, numbers in enumerate(self._engines):
                gauge.add_metric((self._model, str(number)), value(numbers))
            yield gauge
        preempted = CounterMetricFamily("vllm:num_preemptions", "Answers that lost their slot for a while.", labels=_LABELS)
        for number, numbers in enumerate(self._engines):
            preempted.add_metric((self._model, str(number)), numbers.preemptions)
        yield preempted


def _cache_share(numbers: EngineStatistics) -> float:
    return numbers.cache_bytes / numbers.cache_limit if numbers.cache_limit else 0.0
