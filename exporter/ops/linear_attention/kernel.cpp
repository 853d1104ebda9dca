// Causal linear attention on a CPU; see __init__.py for the formulas and native/recurrence.h for how they are solved.
#include "recurrence.h"
#include "schemas.h"

namespace isthmus::ISTHMUS_ISA {
namespace schema = schemas::linear_attention;

void linear_attention(const Call& call) {
  const char* rule = call.attributes[schema::attribute_update_rule].text;
  Recurrence s = {};
  s.q = source(call, schema::q);
  s.k = source(call, schema::k);
  s.v = source(call, schema::v);
  s.decay = source(call, schema::decay);
  s.beta = source(call, schema::beta);
  s.initial = call.input<float>(schema::initial_state);
  s.y = target(call, schema::out_y);
  s.last = call.output<float>(schema::out_last_state);
  s.batch = call.size(schema::size_batch);
  s.length = call.size(schema::size_length);
  s.heads = call.size(schema::size_kv_num_heads);
  s.key = call.size(schema::size_key);
  s.value = call.size(schema::size_value);
  s.decays = s.decay ? call.size(schema::size_decays) : 0;
  s.betas = s.beta ? call.size(schema::size_betas) : 0;
  const int64_t q_heads = call.size(schema::size_q_num_heads);
  const bool gated = !strcmp(rule, "gated") || !strcmp(rule, "gated_delta");
  const bool delta = !strcmp(rule, "delta") || !strcmp(rule, "gated_delta");
  if (!gated && !delta && strcmp(rule, "linear")) refuse("linear_attention: update_rule is none of linear, gated, delta, gated_delta");
  if (gated != (bool(s.decay))) refuse("linear_attention: decay goes with the rules gated and gated_delta, and with no other");
  if (delta != (bool(s.beta))) refuse("linear_attention: beta goes with the rules delta and gated_delta, and with no other");
  if (q_heads % s.heads) refuse("linear_attention: q_num_heads is not a multiple of kv_num_heads");
  if (s.decay && s.decays != 1 && s.decays != s.key) refuse("linear_attention: decay has neither one number a head nor one a key channel");
  if (s.beta && s.betas != 1 && s.betas != s.heads) refuse("linear_attention: beta has neither one number nor one a head");
  s.repeats = q_heads / s.heads;
  s.scale = static_cast<float>(call.number(schema::attribute_scale));
  if (s.scale == 0.0f) s.scale = 1.0f / __builtin_sqrtf(static_cast<float>(s.key));
  if (delta) {
    solve_all<Rule::correct>(call, s);
  } else {
    solve_all<Rule::write>(call, s);
  }
}

}  // namespace isthmus::ISTHMUS_ISA
