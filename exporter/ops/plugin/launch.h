// Launch plans as tables, and what one of them becomes for the sizes of an execution context. The tables are generated from `gpu.py`.
#ifndef ISTHMUS_LAUNCH_H
#define ISTHMUS_LAUNCH_H

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "driver.h"
#include "operator.h"

namespace isthmus {

// An expression over the values of a plan: the sizes of the schema, the attributes that are integers, and the plan's own sizes.
using Expression = std::int64_t (*)(const std::int64_t* v);

inline std::int64_t cdiv(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

enum class Element { float32, float16, bfloat16, float8, int32 };

std::size_t bytes_of(Element element);
const char* name_of(Element element);

// A kernel compiled for one architecture; `capability` is 10 major + minor.
struct Image {
  int capability;
  bool specific;  // code of this very architecture (sm_90a), which no later one runs
  unsigned shared;  // bytes of dynamic shared memory
  const unsigned char* data;
  std::size_t size;
};

enum class Kind { pointer, integer, real };

// What is passed for a parameter: a tensor by its name, an expression, or an attribute by its name.
struct Parameter {
  Kind kind;
  const char* name;
  Expression value;
};

struct Launch {
  const char* kernel;
  unsigned threads;
  Expression when;
  Expression grid[3];
  const Parameter* parameters;
  std::size_t parameter_count;
  const Image* images;
  std::size_t image_count;
};

struct Tensor {
  const char* name;
  Element element;
};

struct Workspace {
  const char* name;
  Element element;
  Expression elements;  // how many
};

struct Plan {
  const char* form;
  const char* name;
  Element activations;
  Expression fits;
  Expression prefer;
  const char* const* values;  // names of sizes and attributes that `v` starts with
  std::size_t value_count;
  void (*sizes)(std::int64_t* v);  // appends the plan's own
  std::size_t size_count;
  const Tensor* tensors;  // inputs and outputs
  std::size_t tensor_count;
  const Workspace* workspaces;
  std::size_t workspace_count;
  const Launch* launches;
  std::size_t launch_count;
};

// Every plan of every operator, in the order in which they are tried. Generated.
const std::vector<Plan>& plans();

// The element type of a tensor in a plan.
const Tensor* find(const Plan& plan, const std::string& name);

// The first plan of the form that takes the inputs' types (`mismatch` says why one does not), fits and is preferred; null, with the reason,
// where there is none.
const Plan* choose(const std::string& form, const std::function<std::string(const Plan&)>& mismatch, const Sizes& sizes,
                   std::string& reason);

// The values that a plan's expressions read.
std::vector<std::int64_t> values_of(const Plan& plan, const Sizes& sizes);

// Bytes of a plan's workspace, of which each part starts at a multiple of 256; `zeros` are further tensors, in bytes.
std::size_t workspace_bytes(const Plan& plan, const std::vector<std::int64_t>& values, const std::vector<std::size_t>& zeros);

struct Module;

// A plan made ready for some sizes on the current device: everything that a launch needs but the addresses.
class Prepared {
 public:
  // Loads the kernels. `names` are those of the tensors whose addresses `launch` will get, `zeros` tensors that the node lacks and their
  // bytes. Returns why it cannot be done; empty when it was.
  std::string prepare(const Plan& plan, const Node& node, const Names& names, const Sizes& sizes,
                      const std::vector<std::pair<std::string, std::size_t>>& zeros);

  // Launches the kernels on a stream. Nothing is allocated on the way, so that a CUDA graph can be captured from it.
  std::string launch(const std::vector<std::uint64_t>& addresses, std::uint64_t workspace, void* stream);

  bool ready() const { return !steps_.empty(); }

 private:
  // A parameter's value, or where it comes from: the address of a tensor, or an offset in the workspace.
  struct Argument {
    Kind kind;
    bool in_workspace = false;
    std::size_t index = 0;
    std::uint64_t address = 0;
    std::int32_t integer = 0;
    float real = 0.0F;
  };
  struct Step {
    std::shared_ptr<Module> module;
    void* function = nullptr;
    std::string kernel;
    unsigned grid[3] = {1, 1, 1};
    unsigned threads = 0;
    unsigned shared = 0;
    std::vector<Argument> arguments;
    std::vector<void*> parameters;
  };
  struct Zeros {
    std::size_t offset;
    std::size_t bytes;
  };
  std::string step(const Launch& launch, const Node& node, const Names& names, const std::vector<std::pair<std::string, std::size_t>>& parts,
                   const std::int64_t* v, int capability);
  std::vector<Step> steps_;
  std::vector<Zeros> zeros_;
};

}  // namespace isthmus

#endif
