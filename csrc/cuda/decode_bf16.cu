#include "cuda/decode.cuh"

template int ssd::cuda::start_decode<ssd::cuda::BFloat16, 0>(const DecodeParams&, const Launch&, void*);
