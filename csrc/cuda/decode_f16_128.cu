#include "cuda/decode.cuh"

template int ssd::cuda::start_decode<ssd::cuda::Float16, 128>(const DecodeParams&, const Launch&, void*);
