// The custom ops of domain qwen.native for ONNX Runtime's CPU execution provider.

#include <exception>

#include "ops.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) return base->GetApi(1)->CreateStatus(ORT_FAIL, "this ONNX Runtime is older than the headers the plugin was built with");
  Ort::InitApi(api);
  try {
    static Ort::CustomOpDomain domain = [] {
      Ort::CustomOpDomain made("qwen.native");
      qwen::add_linear(made);
      qwen::add_delta_net(made);
      qwen::add_moe(made);
      qwen::add_quantized(made);
      qwen::add_top_logits(made);
      return made;
    }();
    Ort::UnownedSessionOptions(options).Add(domain);
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
  return nullptr;
}
