#include "cuda/decode.cuh"

template int ssd::cuda::start_decode<ssd::cuda::Float16, 64>(const DecodeParams&, const Launch&, void*);
