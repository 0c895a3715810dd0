"""Our plugins in the form that each flavour of TensorRT builds them from: quick-deployable ones, or IPluginV3 on RTX."""

from __future__ import annotations

from qwen_export.plugins.tensorrt import quick_plugin
from qwen_export.plugins.tensorrt.library_name import ensure_plain_name
from qwen_export.runtimes.backends.tensorrt import delta_net_plugin
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import AOT_PLUGINS, Library


def make_known(library: Library) -> None:
    """Register our plugins with a TensorRT that is about to parse them."""
    if library.has(AOT_PLUGINS):
        quick_plugin.register(library)
    else:
        ensure_plain_name()
        delta_net_plugin.register(library)
