#include "cuda/decode.cuh"

template int ssd::cuda::start_decode<ssd::cuda::BFloat16, 64>(const DecodeParams&, const Launch&, void*);
