// What every processor can do.

#define ISA_NAMESPACE portable
#include "elementwise_isa.h"
#include "forest_attention_isa.h"
#include "linear_nll_isa.h"
#include "packed_nll_isa.h"

namespace fastcompat {

static bool offered() { return true; }

const Isa kPortable{"portable",
                    offered,
                    portable::kBlock,
                    false,
                    portable::pack,
                    portable::widen,
                    portable::target_logits,
                    portable::fold,
                    portable::packed_token,
                    portable::pack_operands,
                    portable::attend,
                    portable::rms_norm_tokens,
                    portable::rotate_tokens,
                    portable::gated_tokens};

}  // namespace fastcompat
