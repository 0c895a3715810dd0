// The part of ONNX Runtime's C interface that the plugins use, so that they compile without ONNX Runtime's headers, which no package of pip
// has. The interface is binary and fixed: a version of it only appends functions to its table and fields to OrtCustomOp, and `GetApi(version)`
// of any later release returns a table that begins like that version's. Places in the table are asserted below; tests compare all of this
// with the real headers where these are installed.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtMemoryInfo;
struct OrtCustomOp;

// Values of ONNXTensorElementDataType.
enum class OrtElement : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16, kFloat8E4m3 = 17 };
// OrtErrorCode ORT_FAIL, OrtAllocatorType OrtDeviceAllocator, OrtMemType OrtMemTypeDefault, OrtCustomOpInputOutputCharacteristic.
enum class OrtError : int { kFail = 1 };
enum class OrtAllocatorKind : int { kDevice = 0 };
enum class OrtMemoryKind : int { kDefault = 0 };
enum class OrtCharacteristic : int { kRequired = 0, kOptional = 1 };

struct OrtAllocator {
  uint32_t version;
  void* (*Alloc)(OrtAllocator*, size_t bytes);
  void (*Free)(OrtAllocator*, void*);
  // More functions follow; the plugins get allocators from ONNX Runtime and make none.
};

// The interface's version that the plugins request: that of ONNX Runtime 1.18, which has all of the functions below.
inline constexpr uint32_t kOrtApiVersion = 18;

struct OrtApi {
  using Unused = void*;

  OrtStatus* (*CreateStatus)(OrtError, const char* message);                                                  // 0
  Unused unused_1[1];
  const char* (*GetErrorMessage)(const OrtStatus*);                                                           // 2
  Unused unused_3[23];
  OrtStatus* (*CreateCustomOpDomain)(const char* name, OrtCustomOpDomain**);                                  // 26
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain*, const OrtCustomOp*);                                   // 27
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions*, OrtCustomOpDomain*);                                    // 28
  Unused unused_29[22];
  OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);                                                      // 51
  Unused unused_52[9];
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, size_t*);                                // 61
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t* values, size_t count);               // 62
  Unused unused_63[2];
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);                          // 65
  Unused unused_66[2];
  OrtStatus* (*CreateMemoryInfo)(const char* name, OrtAllocatorKind, int device, OrtMemoryKind, OrtMemoryInfo**);  // 68
  Unused unused_69[16];
  OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo*, const char* name, float*);                 // 85
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo*, const char* name, int64_t*);               // 86
  OrtStatus* (*KernelInfoGetAttribute_string)(const OrtKernelInfo*, const char* name, char*, size_t* size);    // 87
  OrtStatus* (*KernelContext_GetInputCount)(const OrtKernelContext*, size_t*);                                // 88
  Unused unused_89[1];
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext*, size_t, const OrtValue**);                    // 90
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext*, size_t, const int64_t* shape, size_t rank, OrtValue**);  // 91
  Unused unused_92[1];
  void (*ReleaseStatus)(OrtStatus*);                                                                          // 93
  void (*ReleaseMemoryInfo)(OrtMemoryInfo*);                                                                  // 94
  Unused unused_95[4];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);                                          // 99
  Unused unused_100[32];
  void (*ReleaseAllocator)(OrtAllocator*);                                                                    // 132
  Unused unused_133[60];
  OrtStatus* (*KernelContext_GetGPUComputeStream)(const OrtKernelContext*, void** stream);                    // 193
  Unused unused_194[59];
  OrtStatus* (*KernelContext_GetAllocator)(const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator**);    // 253
  Unused unused_254[11];
  OrtStatus* (*KernelContext_GetResource)(const OrtKernelContext*, int version, int id, void** resource);     // 265
  Unused unused_266[8];
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext*, void (*task)(void* data, size_t index), size_t count, size_t batches,
                                          void* data);                                                        // 274
  Unused unused_275[2];
  // Memory that belongs to the call's stream; freed by the allocator of the same device.
  OrtStatus* (*KernelContext_GetScratchBuffer)(const OrtKernelContext*, const OrtMemoryInfo*, size_t bytes, void**);  // 277
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// The description of an op. Functions from GetMayInplace on may be null.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  OrtElement (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  OrtElement (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  OrtCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  OrtCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  OrtMemoryKind (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, void*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

#define QWEN_PLACE(name, place) static_assert(offsetof(OrtApi, name) == (place) * sizeof(void*), "place of " #name)
QWEN_PLACE(CreateStatus, 0);
QWEN_PLACE(GetErrorMessage, 2);
QWEN_PLACE(CreateCustomOpDomain, 26);
QWEN_PLACE(CustomOpDomain_Add, 27);
QWEN_PLACE(AddCustomOpDomain, 28);
QWEN_PLACE(GetTensorMutableData, 51);
QWEN_PLACE(GetDimensionsCount, 61);
QWEN_PLACE(GetDimensions, 62);
QWEN_PLACE(GetTensorTypeAndShape, 65);
QWEN_PLACE(CreateMemoryInfo, 68);
QWEN_PLACE(KernelInfoGetAttribute_float, 85);
QWEN_PLACE(KernelInfoGetAttribute_int64, 86);
QWEN_PLACE(KernelInfoGetAttribute_string, 87);
QWEN_PLACE(KernelContext_GetInputCount, 88);
QWEN_PLACE(KernelContext_GetInput, 90);
QWEN_PLACE(KernelContext_GetOutput, 91);
QWEN_PLACE(ReleaseStatus, 93);
QWEN_PLACE(ReleaseMemoryInfo, 94);
QWEN_PLACE(ReleaseTensorTypeAndShapeInfo, 99);
QWEN_PLACE(ReleaseAllocator, 132);
QWEN_PLACE(KernelContext_GetGPUComputeStream, 193);
QWEN_PLACE(KernelContext_GetAllocator, 253);
QWEN_PLACE(KernelContext_GetResource, 265);
QWEN_PLACE(KernelContext_ParallelFor, 274);
QWEN_PLACE(KernelContext_GetScratchBuffer, 277);
#undef QWEN_PLACE
static_assert(sizeof(void*) == 8, "the plugins are for 64-bit systems");
