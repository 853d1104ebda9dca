#include "driver.h"

#include <dlfcn.h>

#include <atomic>

namespace isthmus {
namespace {

std::atomic<const IsthmusDriver*> replacement{nullptr};

struct Library {
  IsthmusDriver table{};
  std::string reason;

  Library() {
    void* handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (handle == nullptr) {
      const char* text = dlerror();
      reason = std::string("the CUDA driver cannot be opened: ") + (text != nullptr ? text : "libcuda.so.1");
      return;
    }
    find(handle, "cuCtxGetCurrent", table.context);
    find(handle, "cuCtxGetDevice", table.device);
    find(handle, "cuDeviceGetAttribute", table.device_attribute);
    find(handle, "cuModuleLoadData", table.load);
    find(handle, "cuModuleUnload", table.unload);
    find(handle, "cuModuleGetFunction", table.function);
    find(handle, "cuFuncSetAttribute", table.function_attribute);
    find(handle, "cuMemsetD8Async", table.fill);
    find(handle, "cuLaunchKernel", table.launch);
    find(handle, "cuGetErrorString", table.error);
  }

  template <class Function>
  void find(void* handle, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
    if (function == nullptr) reason = std::string("the CUDA driver has no ") + name;
  }
};

}  // namespace

const IsthmusDriver* driver(std::string& reason) {
  if (const IsthmusDriver* table = replacement.load()) return table;
  static const Library library;
  reason = library.reason;
  return reason.empty() ? &library.table : nullptr;
}

std::string describe(const IsthmusDriver& driver, const char* call, int result) {
  const char* text = nullptr;
  if (driver.error(result, &text) != 0 || text == nullptr) text = "unknown error";
  return std::string(call) + " failed with " + std::to_string(result) + ": " + text;
}

}  // namespace isthmus

extern "C" __attribute__((visibility("default"))) void isthmus_trt_set_driver(const IsthmusDriver* driver) {
  isthmus::replacement.store(driver);
}
