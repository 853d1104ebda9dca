#include "launch.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

namespace isthmus {
namespace {

constexpr std::size_t kAlignment = 256;
constexpr std::int64_t kLargest = 2147483647;  // of an integer argument, and of a grid's x
constexpr std::int64_t kLargestYZ = 65535;     // of a grid's y and z
constexpr unsigned kSharedByDefault = 48U * 1024U;
constexpr int kMaxDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kMajor = 75;            // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kMinor = 76;            // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR

std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

// A loaded image. Contexts of one device share nothing, so that a module belongs to the context in which it was loaded.
struct Module {
  const IsthmusDriver* driver = nullptr;
  void* context = nullptr;
  void* handle = nullptr;

  Module() = default;
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;
  ~Module() {
    // After the context is gone, or in another one, the handle means nothing: the driver has freed it, or will with its context.
    void* current = nullptr;
    if (handle != nullptr && driver->context(&current) == 0 && current == context) driver->unload(handle);
  }
};

namespace {

// The modules that some plugin holds, so that the layers of a network that use one kernel load it once.
class Modules {
 public:
  std::string load(const IsthmusDriver& driver, const Image& image, std::shared_ptr<Module>& module) {
    void* context = nullptr;
    if (int result = driver.context(&context); result != 0) return describe(driver, "cuCtxGetCurrent", result);
    const std::lock_guard<std::mutex> lock(mutex_);
    std::weak_ptr<Module>& known = loaded_[{&driver, context, image.data}];
    module = known.lock();
    if (module != nullptr) return "";
    auto fresh = std::make_shared<Module>();
    if (int result = driver.load(&fresh->handle, image.data); result != 0) {
      fresh->handle = nullptr;
      return describe(driver, "cuModuleLoadData", result);
    }
    fresh->driver = &driver;
    fresh->context = context;
    known = module = fresh;
    return "";
  }

 private:
  std::mutex mutex_;
  std::map<std::tuple<const void*, const void*, const void*>, std::weak_ptr<Module>> loaded_;
};

Modules& modules() {
  static Modules all;
  return all;
}

// The image to run on a device: that of the same architecture, or the newest before it of the same major, whose code still runs.
const Image* choose_image(const Launch& launch, int capability) {
  const Image* best = nullptr;
  for (std::size_t i = 0; i < launch.image_count; ++i) {
    const Image& image = launch.images[i];
    const bool runs = image.specific ? image.capability == capability
                                     : image.capability / 10 == capability / 10 && image.capability <= capability;
    if (runs && (best == nullptr || image.capability > best->capability)) best = &image;
  }
  return best;
}

std::string architectures(const Launch& launch) {
  std::string text;
  for (std::size_t i = 0; i < launch.image_count; ++i) {
    const Image& image = launch.images[i];
    text += (i > 0 ? ", sm_" : "sm_") + std::to_string(image.capability) + (image.specific ? "a" : "");
  }
  return text.empty() ? "none" : text;
}

}  // namespace

std::size_t bytes_of(Element element) {
  switch (element) {
    case Element::float32:
    case Element::int32:
      return 4;
    case Element::float16:
    case Element::bfloat16:
      return 2;
    case Element::float8:
      return 1;
  }
  return 0;
}

const char* name_of(Element element) {
  switch (element) {
    case Element::float32:
      return "float32";
    case Element::float16:
      return "float16";
    case Element::bfloat16:
      return "bfloat16";
    case Element::float8:
      return "float8_e4m3fn";
    case Element::int32:
      return "int32";
  }
  return "unknown";
}

const Tensor* find(const Plan& plan, const std::string& name) {
  for (std::size_t i = 0; i < plan.tensor_count; ++i) {
    if (plan.tensors[i].name == name) return &plan.tensors[i];
  }
  return nullptr;
}

std::vector<std::int64_t> values_of(const Plan& plan, const Sizes& sizes) {
  std::vector<std::int64_t> values;
  values.reserve(plan.value_count + plan.size_count);
  for (std::size_t i = 0; i < plan.value_count; ++i) {
    const auto found = sizes.find(plan.values[i]);
    values.push_back(found != sizes.end() ? found->second : 0);
  }
  values.resize(plan.value_count + plan.size_count);
  return values;
}

const Plan* choose(const std::string& form, const std::function<std::string(const Plan&)>& mismatch, const Sizes& sizes,
                   std::string& reason) {
  std::string refused;
  for (const Plan& plan : plans()) {
    if (plan.form != form) continue;
    if (std::string wrong = mismatch(plan); !wrong.empty()) {
      reason = wrong;
      continue;
    }
    const std::vector<std::int64_t> values = values_of(plan, sizes);
    if (plan.fits(values.data()) == 0) {
      refused += std::string(refused.empty() ? "" : ", ") + plan.name;
    } else if (plan.prefer(values.data()) != 0) {
      return &plan;
    }
  }
  if (!refused.empty()) {
    reason = "no kernel takes these sizes (tried " + refused + "):";
    for (const auto& item : sizes) reason += " " + item.first + " = " + std::to_string(item.second);
  }
  return nullptr;
}

std::size_t workspace_bytes(const Plan& plan, const std::vector<std::int64_t>& values, const std::vector<std::size_t>& zeros) {
  std::size_t total = 0;
  for (std::size_t i = 0; i < plan.workspace_count; ++i) {
    const Workspace& part = plan.workspaces[i];
    total += aligned(static_cast<std::size_t>(part.elements(values.data())) * bytes_of(part.element));
  }
  for (const std::size_t bytes : zeros) total += aligned(bytes);
  return total;
}

std::string Prepared::prepare(const Plan& plan, const Node& node, const Names& names, const Sizes& sizes,
                              const std::vector<std::pair<std::string, std::size_t>>& zeros) {
  steps_.clear();
  zeros_.clear();
  std::string reason;
  const IsthmusDriver* table = driver(reason);
  if (table == nullptr) return reason;
  int device = 0;
  int major = 0;
  int minor = 0;
  if (int result = table->device(&device); result != 0) return describe(*table, "cuCtxGetDevice", result);
  if (int result = table->device_attribute(&major, kMajor, device); result != 0) return describe(*table, "cuDeviceGetAttribute", result);
  if (int result = table->device_attribute(&minor, kMinor, device); result != 0) return describe(*table, "cuDeviceGetAttribute", result);

  std::vector<std::int64_t> values = values_of(plan, sizes);
  plan.sizes(values.data());
  std::vector<std::pair<std::string, std::size_t>> parts;  // of the workspace, with their offsets
  std::size_t offset = 0;
  for (std::size_t i = 0; i < plan.workspace_count; ++i) {
    const Workspace& part = plan.workspaces[i];
    parts.emplace_back(part.name, offset);
    offset += aligned(static_cast<std::size_t>(part.elements(values.data())) * bytes_of(part.element));
  }
  for (const auto& item : zeros) {
    parts.emplace_back(item.first, offset);
    zeros_.push_back({offset, item.second});
    offset += aligned(item.second);
  }
  for (std::size_t i = 0; i < plan.launch_count && reason.empty(); ++i) {
    if (plan.launches[i].when(values.data()) != 0) {
      reason = step(plan.launches[i], node, names, parts, values.data(), 10 * major + minor);
    }
  }
  if (!reason.empty()) steps_.clear();
  return reason;
}

std::string Prepared::step(const Launch& launch, const Node& node, const Names& names,
                           const std::vector<std::pair<std::string, std::size_t>>& parts, const std::int64_t* v, int capability) {
  Step step;
  step.kernel = launch.kernel;
  step.threads = launch.threads;
  for (int axis = 0; axis < 3; ++axis) {
    const std::int64_t size = launch.grid[axis](v);
    const std::int64_t most = axis == 0 ? kLargest : kLargestYZ;
    if (size < 1 || size > most) {
      return "the grid of " + step.kernel + " has " + std::to_string(size) + " on axis " + std::to_string(axis) + ", expected 1 to " +
             std::to_string(most);
    }
    step.grid[axis] = static_cast<unsigned>(size);
  }
  for (std::size_t j = 0; j < launch.parameter_count; ++j) {
    const Parameter& parameter = launch.parameters[j];
    Argument argument{parameter.kind};
    if (parameter.kind == Kind::integer) {
      const std::int64_t value = parameter.value(v);
      if (value < 0 || value > kLargest) {
        return std::string(parameter.name) + " = " + std::to_string(value) + " of " + step.kernel + " is outside 0 to " +
               std::to_string(kLargest);
      }
      argument.integer = static_cast<std::int32_t>(value);
    } else if (parameter.kind == Kind::real) {
      argument.real = node.reals.at(parameter.name);
    } else if (const auto named = std::find(names.begin(), names.end(), parameter.name); named != names.end()) {
      argument.index = static_cast<std::size_t>(named - names.begin());
    } else {
      const auto part = std::find_if(parts.begin(), parts.end(), [&](const auto& item) { return item.first == parameter.name; });
      if (part == parts.end()) return std::string("the kernel ") + step.kernel + " needs a tensor " + parameter.name;
      argument.in_workspace = true;
      argument.index = part->second;
    }
    step.arguments.push_back(argument);
  }
  const Image* image = choose_image(launch, capability);
  if (image == nullptr) {
    return "no kernel " + step.kernel + " for compute capability " + std::to_string(capability / 10) + "." + std::to_string(capability % 10) +
           ": this library holds " + architectures(launch);
  }
  step.shared = image->shared;
  std::string reason;
  const IsthmusDriver* table = driver(reason);
  if (table == nullptr) return reason;
  if (reason = modules().load(*table, *image, step.module); !reason.empty()) return reason;
  if (int result = table->function(&step.function, step.module->handle, launch.kernel); result != 0) {
    return describe(*table, "cuModuleGetFunction", result);
  }
  if (step.shared > kSharedByDefault) {
    if (int result = table->function_attribute(step.function, kMaxDynamicShared, static_cast<int>(step.shared)); result != 0) {
      return describe(*table, "cuFuncSetAttribute", result);
    }
  }
  steps_.push_back(std::move(step));
  // The addresses of the values stay: neither `steps_` moves its elements' vectors, nor does anything grow them.
  for (Argument& argument : steps_.back().arguments) {
    void* const value = argument.kind == Kind::pointer   ? static_cast<void*>(&argument.address)
                        : argument.kind == Kind::integer ? static_cast<void*>(&argument.integer)
                                                         : static_cast<void*>(&argument.real);
    steps_.back().parameters.push_back(value);
  }
  // A kernel that Triton compiled ends in two addresses of scratch memory. Ours use none, which their compilation checks.
  static std::uint64_t scratch = 0;
  steps_.back().parameters.insert(steps_.back().parameters.end(), 2, &scratch);
  return "";
}

std::string Prepared::launch(const std::vector<std::uint64_t>& addresses, std::uint64_t workspace, void* stream) {
  std::string reason;
  const IsthmusDriver* table = driver(reason);
  if (table == nullptr) return reason;
  for (const Zeros& zeros : zeros_) {
    if (int result = table->fill(workspace + zeros.offset, 0, zeros.bytes, stream); result != 0) {
      return describe(*table, "cuMemsetD8Async", result);
    }
  }
  for (Step& step : steps_) {
    for (Argument& argument : step.arguments) {
      if (argument.kind == Kind::pointer) argument.address = argument.in_workspace ? workspace + argument.index : addresses[argument.index];
    }
    const int result = table->launch(step.function, step.grid[0], step.grid[1], step.grid[2], step.threads, 1, 1, step.shared, stream,
                                     step.parameters.data(), nullptr);
    if (result != 0) return describe(*table, "cuLaunchKernel", result) + " (" + step.kernel + ")";
  }
  return "";
}

}  // namespace isthmus
