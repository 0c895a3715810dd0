// d3d12.dll for DirectML under Wine: Wine's vkd3d, compiled with DXIL shaders, and two answers as Windows gives them: a process has one
// device, whoever asks for it, and "there are no metacommands" is not a failure.
#include <windows.h>
#include <d3d12.h>
#include <dxgi1_4.h>
#include <vkd3d.h>

static const GUID iid_factory = {0x1bc6ea02, 0xef36, 0x464f, {0xbf, 0x0c, 0x21, 0xca, 0x39, 0xe5, 0x16, 0x8a}};  // IDXGIFactory4
static const GUID iid_adapter = {0x2411e7e1, 0x12ac, 0x4ccf, {0xbd, 0x14, 0x97, 0x98, 0xe8, 0x53, 0x4d, 0xc0}};  // IDXGIAdapter
static const GUID iid_device = {0x8b4f173b, 0x2fea, 0x4b80, {0x8f, 0x58, 0x43, 0x07, 0x19, 0x1a, 0xb9, 0x5d}};   // ID3D12Device5

static CRITICAL_SECTION lock;
static ID3D12Device5 *device;

static HRESULT signal(HANDLE event) { return SetEvent(event) ? S_OK : E_FAIL; }

static HRESULT STDMETHODCALLTYPE no_metacommands(ID3D12Device5 *self, UINT *count, D3D12_META_COMMAND_DESC *found) {
    (void)self, (void)found;
    if (count) *count = 0;
    return S_OK;
}

// vkd3d answers E_NOTIMPL, which DirectML takes for a broken device. All devices share the table of functions.
static void answer_metacommands(ID3D12Device5 *of) {
    ID3D12Device5Vtbl *table = (ID3D12Device5Vtbl *)of->lpVtbl;
    DWORD before;
    VirtualProtect(table, sizeof *table, PAGE_READWRITE, &before);
    table->EnumerateMetaCommands = no_metacommands;
    VirtualProtect(table, sizeof *table, before, &before);
}

// DirectML looks up the adapter of a device by this number.
static LUID luid_of(IUnknown *given) {
    typedef HRESULT(WINAPI * Create)(UINT, REFIID, void **);
    LUID luid = {0, 0};
    IDXGIFactory4 *factory = NULL;
    IDXGIAdapter *adapter = NULL;
    DXGI_ADAPTER_DESC about;
    if (given) {
        IUnknown_QueryInterface(given, &iid_adapter, (void **)&adapter);
    } else {
        Create create = (Create)(void *)GetProcAddress(LoadLibraryA("dxgi.dll"), "CreateDXGIFactory2");
        if (create && SUCCEEDED(create(0, &iid_factory, (void **)&factory))) {
            IDXGIFactory4_EnumAdapters(factory, 0, &adapter);
            IDXGIFactory4_Release(factory);
        }
    }
    if (adapter) {
        if (SUCCEEDED(IDXGIAdapter_GetDesc(adapter, &about))) luid = about.AdapterLuid;
        IDXGIAdapter_Release(adapter);
    }
    return luid;
}

static HRESULT create(IUnknown *adapter, D3D_FEATURE_LEVEL level) {
    struct vkd3d_application_info application = {.type = VKD3D_STRUCTURE_TYPE_APPLICATION_INFO, .api_version = VKD3D_API_VERSION_1_2};
    struct vkd3d_instance_create_info about_instance = {
        .type = VKD3D_STRUCTURE_TYPE_INSTANCE_CREATE_INFO,
        .next = &application,
        .pfn_signal_event = signal,
        .wchar_size = sizeof(WCHAR),
    };
    struct vkd3d_instance *instance;
    HRESULT result = vkd3d_create_instance(&about_instance, &instance);
    if (FAILED(result)) return result;
    struct vkd3d_device_create_info about_device = {
        .type = VKD3D_STRUCTURE_TYPE_DEVICE_CREATE_INFO,
        .minimum_feature_level = level,
        .instance = instance,
        .adapter_luid = luid_of(adapter),
    };
    result = vkd3d_create_device(&about_device, &iid_device, (void **)&device);
    vkd3d_instance_decref(instance);
    if (SUCCEEDED(result)) answer_metacommands(device);
    return result;
}

HRESULT WINAPI D3D12CreateDevice(IUnknown *adapter, D3D_FEATURE_LEVEL level, REFIID iid, void **out) {
    EnterCriticalSection(&lock);
    HRESULT result = device ? S_OK : create(adapter, level);
    LeaveCriticalSection(&lock);
    if (FAILED(result)) return result;
    return out ? ID3D12Device5_QueryInterface(device, iid, out) : S_FALSE;  // S_FALSE: it only asks whether there could be one
}

HRESULT WINAPI D3D12SerializeRootSignature(const D3D12_ROOT_SIGNATURE_DESC *about, D3D_ROOT_SIGNATURE_VERSION version, ID3DBlob **out,
                                                  ID3DBlob **errors) {
    return vkd3d_serialize_root_signature(about, version, out, errors);
}

HRESULT WINAPI D3D12SerializeVersionedRootSignature(const D3D12_VERSIONED_ROOT_SIGNATURE_DESC *about, ID3DBlob **out, ID3DBlob **errors) {
    return vkd3d_serialize_versioned_root_signature(about, out, errors);
}

HRESULT WINAPI D3D12CreateRootSignatureDeserializer(const void *data, SIZE_T size, REFIID iid, void **out) {
    return vkd3d_create_root_signature_deserializer(data, size, iid, out);
}

HRESULT WINAPI D3D12CreateVersionedRootSignatureDeserializer(const void *data, SIZE_T size, REFIID iid, void **out) {
    return vkd3d_create_versioned_root_signature_deserializer(data, size, iid, out);
}

HRESULT WINAPI D3D12GetDebugInterface(REFIID iid, void **out) {
    (void)iid;
    if (out) *out = NULL;
    return E_NOINTERFACE;
}

HRESULT WINAPI D3D12EnableExperimentalFeatures(UINT count, const IID *iids, void *configurations, UINT *sizes) {
    (void)count, (void)iids, (void)configurations, (void)sizes;
    return E_NOINTERFACE;
}

BOOL WINAPI DllMain(HINSTANCE self, DWORD reason, void *reserved) {
    (void)self, (void)reserved;
    if (reason == DLL_PROCESS_ATTACH) InitializeCriticalSection(&lock);
    return TRUE;
}
