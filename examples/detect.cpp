// Detect in a picture with onnxruntime's C interface, in a file of `sasa-det export --op native --nms`.
//
//     detect MODEL.onnx LIBRARY.so PICTURE.ppm      prints label, score and box of each object
//
// LIBRARY.so is what sasa_det.export.native_op_library() names. The picture is binary PPM, of the size that the
// test pipeline resizes to. docs/export.md says how this is compiled.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>
#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#else
#include "onnxruntime_abi.h"
#endif

static const OrtApi* ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);

static void check(OrtStatus* status) {
  if (!status) return;
  std::fprintf(stderr, "%s\n", ort->GetErrorMessage(status));
  std::exit(1);
}

int main(int argc, char** argv) {
  if (argc != 4 || !ort) return std::fprintf(stderr, "usage: detect MODEL LIBRARY PICTURE\n"), 2;
  std::ifstream file(argv[3], std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, most = 0;
  file >> magic >> width >> height >> most;
  file.get();
  std::vector<unsigned char> pixels(width * height * 3);
  if (magic != "P6" || most != 255 || !file.read(reinterpret_cast<char*>(pixels.data()), pixels.size()))
    return std::fprintf(stderr, "%s is no binary PPM of 8 bits\n", argv[3]), 2;
  // From red, green, blue of one pixel after the other to planes of blue, green, red.
  std::vector<float> planes(pixels.size());
  for (int64_t n = 0; n < width * height; ++n)
    for (int64_t c = 0; c < 3; ++c) planes[(2 - c) * width * height + n] = pixels[3 * n + c];

  OrtEnv* env;
  OrtSessionOptions* options;
  OrtSession* session;
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "detect", &env));
  check(ort->CreateSessionOptions(&options));
  check(ort->RegisterCustomOpsLibrary_V2(options, argv[2]));
  check(ort->CreateSession(env, argv[1], options, &session));

  OrtMemoryInfo* memory;
  OrtValue *image, *found[3] = {};
  const int64_t shape[] = {1, 3, height, width};
  check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  check(ort->CreateTensorWithDataAsOrtValue(memory, planes.data(), planes.size() * sizeof(float), shape, 4,
                                            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &image));
  const char *inputs[] = {"images"}, *outputs[] = {"boxes", "scores", "labels"};
  check(ort->Run(session, nullptr, inputs, &image, 1, outputs, 3, found));

  OrtTensorTypeAndShapeInfo* info;
  int64_t count, *labels;
  float *boxes, *scores;
  check(ort->GetTensorTypeAndShape(found[1], &info));
  check(ort->GetDimensions(info, &count, 1));
  check(ort->GetTensorMutableData(found[0], reinterpret_cast<void**>(&boxes)));
  check(ort->GetTensorMutableData(found[1], reinterpret_cast<void**>(&scores)));
  check(ort->GetTensorMutableData(found[2], reinterpret_cast<void**>(&labels)));
  for (int64_t n = 0; n < count; ++n, boxes += 4)
    std::printf("%d %.4f %.2f %.2f %.2f %.2f\n", static_cast<int>(labels[n]), scores[n], boxes[0], boxes[1],
                boxes[2], boxes[3]);
  // The operating system takes back the rest: the program ends.
}
