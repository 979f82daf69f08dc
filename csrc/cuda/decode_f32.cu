#include "cuda/decode.cuh"

template int ssd::cuda::start_decode<float, 0>(const DecodeParams&, const Launch&, void*);
template int ssd::cuda::start_decode<float, 64>(const DecodeParams&, const Launch&, void*);
template int ssd::cuda::start_decode<float, 128>(const DecodeParams&, const Launch&, void*);
