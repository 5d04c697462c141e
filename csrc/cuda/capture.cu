// SPDX-License-Identifier: Apache-2.0
// Which capture into a graph a stream belongs to.
#include "launch.cuh"

namespace rlkern {

uint64_t capture_of(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cuda::check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id), "capture");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

}  // namespace rlkern
