// Functions of the GPU's driver that return at once; see cuda_host.py.
extern "C" {

int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) {
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = nullptr;
  return 0;
}
int cuCtxSetCurrent(void*) { return 0; }
int cuGetErrorString(int, const char** text) {
  *text = "";
  return 0;
}
int cuStreamIsCapturing(void*, int* status) {
  *status = 0;
  return 0;
}
void* stream_handle(const void*) { return nullptr; }

}  // extern "C"
