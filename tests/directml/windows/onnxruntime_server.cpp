// ONNX Runtime with DirectML behind stdin and stdout, for a driver outside Wine. A command is a line of fields separated by tabs; the answer
// is a line that begins with "ok" or "error". Objects have names that the driver chooses; values travel in files that both sides see.
//
//   open    SESSION MODEL OPTIMIZATION KEY=VALUE...   a session on DirectML; config entries, and profile=PREFIX
//   close   SESSION
//   tensor  VALUE TYPE DIMS                           memory of DirectML's allocator; DIMS are 2,3 or - for a scalar
//   drop    VALUE
//   write   VALUE FILE                                from the file to DirectML
//   read    VALUE FILE                                and back
//   bind    CALL SESSION                              bindings of a session
//   input   CALL NAME VALUE
//   output  CALL NAME VALUE
//   unbind  CALL
//   run     CALL
//   profile SESSION                                   ends profiling, answers with the file
//   memory                                            bytes that the process holds
#include <windows.h>
#include <psapi.h>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>
#include "onnxruntime_c_api.h"

using Fields = std::vector<std::string>;

static const OrtApi *api;
static OrtEnv *environment;
static OrtMemoryInfo *on_device, *on_host;

static void check(OrtStatus *status) {
    if (!status) return;
    std::string message = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    throw std::runtime_error(message);
}

static std::vector<std::string> split(const std::string &text, char at) {
    std::vector<std::string> parts;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, at);) parts.push_back(part);
    return parts;
}

static size_t bytes_of(int type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64: case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE: return 8;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32: return 4;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16: case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16: return 2;
        default: return 1;
    }
}

static OrtSession *open_session(const std::string &model, int optimization, const Fields &entries) {
    OrtSessionOptions *options;
    check(api->CreateSessionOptions(&options));
    check(api->SetIntraOpNumThreads(options, 1));
    check(api->SetSessionLogSeverityLevel(options, 3));
    check(api->DisableMemPattern(options));
    check(api->SetSessionExecutionMode(options, ORT_SEQUENTIAL));
    check(api->SetSessionGraphOptimizationLevel(options, (GraphOptimizationLevel)optimization));
    for (const auto &entry : entries) {
        size_t at = entry.find('=');
        std::string key = entry.substr(0, at), value = entry.substr(at + 1);
        if (key == "profile") check(api->EnableProfiling(options, std::wstring(value.begin(), value.end()).c_str()));
        else check(api->AddSessionConfigEntry(options, key.c_str(), value.c_str()));
    }
    const char *keys[] = {"device_id"}, *values[] = {"0"};
    check(api->SessionOptionsAppendExecutionProvider(options, "DML", keys, values, 1));
    OrtSession *session = nullptr;
    OrtStatus *status = api->CreateSession(environment, std::wstring(model.begin(), model.end()).c_str(), options, &session);
    api->ReleaseSessionOptions(options);
    check(status);
    return session;
}

struct Value {
    OrtValue *device = nullptr, *host = nullptr;
    std::vector<char> bytes;
    int type = 0;
    ~Value() {
        if (device) api->ReleaseValue(device);
        if (host) api->ReleaseValue(host);
    }
};

struct Call {
    OrtSession *session;
    OrtIoBinding *binding;
};

static std::map<std::string, OrtSession *> sessions;
static std::map<std::string, Value> values;
static std::map<std::string, Call> calls;

// ONNX Runtime's C API has no copy to and from DirectML: a graph of one Identity is one. identityN.onnx are the driver's, N a type.
static OrtSession *identity(int type) {
    static std::map<int, OrtSession *> made;
    if (!made[type]) made[type] = open_session("identity" + std::to_string(type) + ".onnx", 0, {});
    return made[type];
}

static void copy(int type, OrtValue *from, OrtValue *to) {
    OrtIoBinding *binding;
    OrtSession *session = identity(type);
    check(api->CreateIoBinding(session, &binding));
    check(api->BindInput(binding, "x", from));
    check(api->BindOutput(binding, "y", to));
    OrtStatus *status = api->RunWithBinding(session, nullptr, binding);
    if (!status) status = api->SynchronizeBoundOutputs(binding);
    api->ReleaseIoBinding(binding);
    check(status);
}

static void make_tensor(Value &value, int type, const std::string &dims) {
    static OrtAllocator *allocator = nullptr;
    if (!allocator) check(api->CreateAllocator(identity(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT), on_device, &allocator));
    std::vector<int64_t> shape;
    size_t bytes = bytes_of(type);
    if (dims != "-")
        for (const auto &size : split(dims, ',')) shape.push_back(atoll(size.c_str())), bytes *= shape.back();
    value.type = type;
    value.bytes.resize(bytes);
    auto kind = (ONNXTensorElementDataType)type;
    check(api->CreateTensorAsOrtValue(allocator, shape.data(), shape.size(), kind, &value.device));
    check(api->CreateTensorWithDataAsOrtValue(on_host, value.bytes.data(), bytes, shape.data(), shape.size(), kind, &value.host));
}

static void transfer(std::vector<char> &bytes, const std::string &path, bool in) {
    FILE *file = fopen(path.c_str(), in ? "rb" : "wb");
    if (!file) throw std::runtime_error("cannot open " + path);
    size_t done = in ? fread(bytes.data(), 1, bytes.size(), file) : fwrite(bytes.data(), 1, bytes.size(), file);
    fclose(file);
    if (done != bytes.size()) throw std::runtime_error("wrong size of " + path);
}

static std::string memory() {
    PROCESS_MEMORY_COUNTERS counters;
    GetProcessMemoryInfo(GetCurrentProcess(), &counters, sizeof counters);
    return std::to_string(counters.WorkingSetSize);
}

static std::string answer(const Fields &field) {
    const std::string &what = field.at(0);
    if (what == "memory") return memory();
    const std::string &name = field.at(1);
    if (what == "open") {
        sessions[name] = open_session(field.at(2), atoi(field.at(3).c_str()), Fields(field.begin() + 4, field.end()));
    } else if (what == "close") {
        api->ReleaseSession(sessions.at(name));
        sessions.erase(name);
    } else if (what == "tensor") {
        make_tensor(values[name], atoi(field.at(2).c_str()), field.at(3));
    } else if (what == "drop") {
        values.erase(name);
    } else if (what == "write") {
        Value &value = values.at(name);
        transfer(value.bytes, field.at(2), true);
        copy(value.type, value.host, value.device);
    } else if (what == "read") {
        Value &value = values.at(name);
        copy(value.type, value.device, value.host);
        transfer(value.bytes, field.at(2), false);
    } else if (what == "bind") {
        Call call = {sessions.at(field.at(2)), nullptr};
        check(api->CreateIoBinding(call.session, &call.binding));
        calls[name] = call;
    } else if (what == "input") {
        check(api->BindInput(calls.at(name).binding, field.at(2).c_str(), values.at(field.at(3)).device));
    } else if (what == "output") {
        check(api->BindOutput(calls.at(name).binding, field.at(2).c_str(), values.at(field.at(3)).device));
    } else if (what == "unbind") {
        api->ReleaseIoBinding(calls.at(name).binding);
        calls.erase(name);
    } else if (what == "run") {
        check(api->RunWithBinding(calls.at(name).session, nullptr, calls.at(name).binding));
    } else if (what == "profile") {
        OrtAllocator *allocator;
        char *file;
        check(api->GetAllocatorWithDefaultOptions(&allocator));
        check(api->SessionEndProfiling(sessions.at(name), allocator, &file));
        return file;
    } else {
        throw std::runtime_error("no such command");
    }
    return "";
}

int main() {
    setvbuf(stdout, nullptr, _IONBF, 0);
    HMODULE library = LoadLibraryA("onnxruntime.dll");
    auto base = (const OrtApiBase *(ORT_API_CALL *)())(void *)GetProcAddress(library, "OrtGetApiBase");
    if (!base) return printf("error no onnxruntime.dll: %lu\n", GetLastError()), 1;
    api = base()->GetApi(ORT_API_VERSION);
    try {
        check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "directml", &environment));
        check(api->CreateMemoryInfo("DML", OrtDeviceAllocator, 0, OrtMemTypeDefault, &on_device));
        check(api->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &on_host));
        printf("ok %s\n", base()->GetVersionString());
    } catch (const std::exception &error) {
        return printf("error %s\n", error.what()), 1;
    }
    std::string line;
    for (int c; (c = getchar()) != EOF;) {
        if (c != '\n') {
            if (c != '\r') line += (char)c;
            continue;
        }
        std::string text;
        try {
            text = "ok " + answer(split(line, '\t'));
        } catch (const std::exception &error) {
            text = std::string("error ") + error.what();
        }
        for (char &one : text)
            if (one == '\n' || one == '\r') one = ' ';
        printf("%s\n", text.c_str());
        line.clear();
    }
    fflush(stdout);
    ExitProcess(0);  // without the destructors of drivers that Wine has ended before
}
