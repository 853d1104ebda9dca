// RWKV-7's time mixing on a CPU; see __init__.py for the formulas and native/recurrence.h for how they are solved.
#include "recurrence.h"
#include "schemas.h"

namespace isthmus::ISTHMUS_ISA {
namespace schema = schemas::rwkv7;

void rwkv7(const Call& call) {
  Recurrence s = {};
  s.q = source(call, schema::r);
  s.k = source(call, schema::k);
  s.v = source(call, schema::v);
  s.decay = source(call, schema::decay);
  s.a = source(call, schema::a);
  s.b = source(call, schema::b);
  s.initial = call.input<float>(schema::initial_state);
  s.y = target(call, schema::out_y);
  s.last = call.output<float>(schema::out_last_state);
  s.batch = call.size(schema::size_batch);
  s.length = call.size(schema::size_length);
  s.heads = call.size(schema::size_num_heads);
  s.repeats = 1;
  s.key = s.decays = call.size(schema::size_key);
  s.value = call.size(schema::size_value);
  s.scale = 1.0f;
  solve_all<Rule::remove>(call, s);
}

}  // namespace isthmus::ISTHMUS_ISA
