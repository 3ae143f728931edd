// The CUDA launchers, free of torch: addresses on the device, sizes, a stream. Each returns null, or the text
// of the error that its launch met. None allocates, synchronises or uses the default stream by itself.
#pragma once

#include <cstdint>

namespace ulfine::cuda {

// logits[B, C] = scale * unit(features[B, D]) unit(prototypes[C, D])', contiguous float32.
const char* proto_logits(const float* features, const float* prototypes, float* logits, int64_t b, int64_t c,
                         int64_t d, float scale, void* stream);

}  // namespace ulfine::cuda
