// GGUF headers: what is read from a good one, and that each broken field is refused by name.
#include "gguf.h"

#include <gtest/gtest.h>

#include <functional>

#include "gguf_builder.h"

namespace motet {
namespace {

GgufFile parse(const GgufBuilder& file) { return parse_gguf(file.bytes.data(), file.bytes.size()); }

const GgufValue& value_of(const GgufFile& file, const std::string& key) {
  for (const auto& [name, value] : file.metadata) {
    if (name == key) return value;
  }
  throw std::out_of_range(key);
}

TEST(Gguf, ReadsEveryKindOfMetadata) {
  GgufBuilder b;
  b.header(0, 16);
  b.scalar<uint8_t>("u8", 0, 200).scalar<int8_t>("i8", 1, -100).scalar<uint16_t>("u16", 2, 60000);
  b.scalar<int16_t>("i16", 3, -30000)
      .scalar<uint32_t>("u32", 4, 4000000000u)
      .scalar<int32_t>("i32", 5, -2000000000);
  b.scalar<float>("f32", 6, 0.5f).scalar<uint8_t>("yes", 7, 1).text("text", "a\nb\xc3\xa9");
  b.scalar<uint64_t>("u64", 10, ~uint64_t{0})
      .scalar<int64_t>("i64", 11, INT64_MIN)
      .scalar<double>("f64", 12, 1e300);
  b.array<int32_t>("ints", 5, {-1, 2, 3}).array<uint8_t>("bools", 7, {1, 0, 1}).texts("texts", {"", "x"});
  b.array<float>("none", 6, {});
  const GgufFile file = parse(b);

  EXPECT_EQ(file.version, 3u);
  EXPECT_EQ(std::get<uint64_t>(value_of(file, "u8")), 200u);
  EXPECT_EQ(std::get<int64_t>(value_of(file, "i8")), -100);
  EXPECT_EQ(std::get<uint64_t>(value_of(file, "u16")), 60000u);
  EXPECT_EQ(std::get<int64_t>(value_of(file, "i16")), -30000);
  EXPECT_EQ(std::get<uint64_t>(value_of(file, "u32")), 4000000000u);
  EXPECT_EQ(std::get<int64_t>(value_of(file, "i32")), -2000000000);
  EXPECT_EQ(std::get<double>(value_of(file, "f32")), 0.5);
  EXPECT_EQ(std::get<bool>(value_of(file, "yes")), true);
  EXPECT_EQ(std::get<std::string>(value_of(file, "text")), "a\nb\xc3\xa9");
  EXPECT_EQ(std::get<uint64_t>(value_of(file, "u64")), ~uint64_t{0});
  EXPECT_EQ(std::get<int64_t>(value_of(file, "i64")), INT64_MIN);
  EXPECT_EQ(std::get<double>(value_of(file, "f64")), 1e300);
  EXPECT_EQ(std::get<std::vector<double>>(value_of(file, "ints")), (std::vector<double>{-1, 2, 3}));
  EXPECT_EQ(std::get<std::vector<bool>>(value_of(file, "bools")), (std::vector<bool>{true, false, true}));
  EXPECT_EQ(std::get<std::vector<std::string>>(value_of(file, "texts")), (std::vector<std::string>{"", "x"}));
  EXPECT_TRUE(std::get<std::vector<double>>(value_of(file, "none")).empty());
  EXPECT_EQ(file.metadata[0].first, "u8");
}

TEST(Gguf, PlacesTensorsInTheAlignedDataRegion) {
  GgufBuilder b;
  b.header(3, 1, 2).scalar<uint32_t>("general.alignment", 4, 64);
  b.tensor("a", {64, 3}, 2, 128).tensor("b", {4}, 0, 0).tensor("c", {256, 2, 2}, 14, 256);
  b.data(256 + 840, 64);
  const GgufFile file = parse(b);
  ASSERT_EQ(file.tensors.size(), 3u);
  const uint64_t data_begin = b.bytes.size() - 256 - 840;
  EXPECT_EQ(file.version, 2u);
  EXPECT_EQ(file.tensors[0].name, "a");
  EXPECT_EQ(file.tensors[0].type, SourceType::kQ4_0);
  EXPECT_EQ(file.tensors[0].dims, (std::vector<int64_t>{64, 3}));
  EXPECT_EQ(file.tensors[0].offset_bytes, data_begin + 128);
  EXPECT_EQ(file.tensors[0].size_bytes, 6u * 18);
  EXPECT_EQ(file.tensors[1].offset_bytes, data_begin);
  EXPECT_EQ(file.tensors[1].size_bytes, 16u);
  EXPECT_EQ(file.tensors[2].type, SourceType::kQ6_K);
  EXPECT_EQ(file.tensors[2].size_bytes, 4u * 210);
}

struct Refusal {
  const char* name;
  const char* message;  // a part of it
  std::function<void(GgufBuilder&)> build;
};

class GgufRefuses : public testing::TestWithParam<Refusal> {};

TEST_P(GgufRefuses, ByName) {
  GgufBuilder b;
  GetParam().build(b);
  try {
    parse(b);
    FAIL() << "parsed";
  } catch (const GgufError& error) {
    EXPECT_NE(std::string(error.what()).find(GetParam().message), std::string::npos) << error.what();
  }
}

// One F32 tensor "w" of 8 elements, with one thing changed.
void one_tensor(GgufBuilder& b, const std::vector<uint64_t>& dims, uint32_t type, uint64_t offset,
                size_t data_size = 64) {
  b.header(1, 0).tensor("w", dims, type, offset).data(data_size);
}

const Refusal kRefusals[] = {
    {"AnEmptyFile", "magic: expected 4 bytes, got 0 left", [](auto&) {}},
    {"AnotherMagic", "magic: expected the bytes GGUF", [](auto& b) { b.raw("GGML", 4).data(64); }},
    {"VersionOne", "version: expected 2 or 3, little-endian, got 1", [](auto& b) { b.header(0, 0, 1); }},
    {"VersionFour", "version: expected 2 or 3, little-endian, got 4", [](auto& b) { b.header(0, 0, 4); }},
    {"BigEndian", "got a big-endian file", [](auto& b) { b.header(0, 0, 0x03000000); }},
    {"ACutHeader", "metadata count: expected 8 bytes, got 3 left",
     [](auto& b) { b.raw("GGUF", 4).number(uint32_t{3}).number(uint64_t{0}).raw("abc", 3); }},
    {"TooManyTensors", "tensor count: expected at most 65536, got 18446744073709551615",
     [](auto& b) { b.header(~0ull, 0); }},
    {"TooMuchMetadata", "metadata count: expected at most 65536, got 4294967296",
     [](auto& b) { b.header(0, 1ull << 32); }},
    {"FewerKeysThanCounted", "metadata 1 key (length)",
     [](auto& b) { b.header(0, 2).template scalar<uint8_t>("a", 0, 1); }},
    {"AKeyBeyondTheFile", "metadata 0 key: expected 1000 bytes",
     [](auto& b) { b.header(0, 1).number(uint64_t{1000}).data(32); }},
    {"AHugeKey", "metadata 0 key: expected a string of at most 65535",
     [](auto& b) { b.header(0, 1).number(~0ull).data(32); }},
    {"AnEmptyKey", "metadata 0 key: expected a key",
     [](auto& b) { b.header(0, 1).template scalar<uint8_t>("", 0, 1); }},
    {"AKeyTwice", "metadata 'a': expected each key once",
     [](auto& b) { b.header(0, 2).template scalar<uint8_t>("a", 0, 1).template scalar<uint8_t>("a", 0, 1); }},
    {"AnUnknownValueType", "metadata 'a' (type): expected a value type from 0 to 12, got 13",
     [](auto& b) { b.header(0, 1).template scalar<uint8_t>("a", 13, 1); }},
    {"ABoolOfTwo", "metadata 'a': expected a bool of 0 or 1, got 2",
     [](auto& b) { b.header(0, 1).template scalar<uint8_t>("a", 7, 2); }},
    {"ABoolOfTwoInAnArray", "metadata 'a': expected a bool",
     [](auto& b) { b.header(0, 1).template array<uint8_t>("a", 7, {1, 2}); }},
    {"AStringBeyondTheFile", "metadata 'a': expected 99 bytes, got 2 left",
     [](auto& b) { b.header(0, 1).string("a").number(uint32_t{8}).number(uint64_t{99}).raw("xy", 2); }},
    {"AStringWhoseLengthWraps", "metadata 'a': expected a string of at most",
     [](auto& b) { b.header(0, 1).string("a").number(uint32_t{8}).number(~0ull - 3).raw("xy", 2); }},
    {"AnArrayOfArrays",
     "metadata 'a': expected an array of numbers, bools or strings, got an array of arrays",
     [](auto& b) {
       b.header(0, 1).string("a").number(uint32_t{9}).number(uint32_t{9}).number(uint64_t{1}).data(32);
     }},
    {"AnArrayOfUnknowns", "metadata 'a' (element type)",
     [](auto& b) {
       b.header(0, 1).string("a").number(uint32_t{9}).number(uint32_t{77}).number(uint64_t{1}).data(32);
     }},
    {"AnArrayBeyondTheFile", "metadata 'a': expected 4000 bytes",
     [](auto& b) {
       b.header(0, 1).string("a").number(uint32_t{9}).number(uint32_t{4}).number(uint64_t{1000}).data(32);
     }},
    {"AHugeArray", "array elements in a file",
     [](auto& b) {
       b.header(0, 1).string("a").number(uint32_t{9}).number(uint32_t{10}).number(1ull << 61).data(32);
     }},
    {"MoreStringsThanBytes", "metadata 'a': expected 30000000 strings",
     [](auto& b) {
       b.header(0, 1).string("a").number(uint32_t{9}).number(uint32_t{8}).number(uint64_t{30000000}).data(32);
     }},
    {"MoreBoolsThanBytes", "metadata 'a': expected 30000000 bytes",
     [](auto& b) {
       b.header(0, 1).string("a").number(uint32_t{9}).number(uint32_t{7}).number(uint64_t{30000000}).data(32);
     }},
    {"AnOddAlignment", "general.alignment: expected a power of two up to 1048576, got 48",
     [](auto& b) { b.header(0, 1).template scalar<uint32_t>("general.alignment", 4, 48); }},
    {"AnAlignmentOfZero", "general.alignment",
     [](auto& b) { b.header(0, 1).template scalar<uint32_t>("general.alignment", 4, 0); }},
    {"AHugeAlignment", "general.alignment",
     [](auto& b) { b.header(0, 1).template scalar<uint64_t>("general.alignment", 10, 1ull << 63); }},
    {"AnAlignmentInWords", "general.alignment: expected an unsigned integer",
     [](auto& b) { b.header(0, 1).text("general.alignment", "32"); }},
    {"AMissingTensor", "tensor 0 name (length)", [](auto& b) { b.header(1, 0); }},
    {"ATensorWithoutName", "tensor 0 name: expected a name",
     [](auto& b) { b.header(1, 0).tensor("", {8}, 0, 0).data(32); }},
    {"ALongTensorName", "tensor 0 name: expected a string of at most 256",
     [](auto& b) { b.header(1, 0).tensor(std::string(300, 'x'), {8}, 0, 0).data(32); }},
    {"ATensorTwice", "tensor 'w': expected each name once",
     [](auto& b) { b.header(2, 0).tensor("w", {8}, 0, 0).tensor("w", {8}, 0, 32).data(64); }},
    {"NoDimensions", "tensor 'w' number of dimensions: expected 1 to 4, got 0",
     [](auto& b) { one_tensor(b, {}, 0, 0); }},
    {"FiveDimensions", "number of dimensions: expected 1 to 4, got 5",
     [](auto& b) { one_tensor(b, {1, 1, 1, 1, 8}, 0, 0); }},
    {"ADimensionOfZero", "tensor 'w' dimension 1", [](auto& b) { one_tensor(b, {8, 0}, 0, 0); }},
    {"DimensionsWhoseProductWraps", "tensor 'w' dimension 1",
     [](auto& b) { one_tensor(b, {1ull << 32, 1ull << 32}, 0, 0); }},
    {"ANegativeDimension", "tensor 'w' dimension 0", [](auto& b) { one_tensor(b, {~0ull}, 0, 0); }},
    {"AnUnknownTensorType", "tensor 'w' type: expected a tensor type of ggml, got 999",
     [](auto& b) { one_tensor(b, {8}, 999, 0); }},
    {"ATypeThatIsNotSupported",
     "tensor 'w' type: expected one of F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, got "
     "IQ4_XS",
     [](auto& b) { one_tensor(b, {256}, 23, 0, 1024); }},
    {"APartialBlock", "tensor 'w' dimension 0: expected a multiple of 32 for type q4_0, got 40",
     [](auto& b) { one_tensor(b, {40, 32}, 2, 0, 4096); }},
    {"AnOffsetOffTheAlignment", "tensor 'w' offset: expected a multiple of the alignment 32, got 8",
     [](auto& b) { one_tensor(b, {8}, 0, 8); }},
    {"ATensorBeyondTheFile", "tensor 'w' extent: expected within the 64 bytes",
     [](auto& b) { one_tensor(b, {9}, 0, 32); }},
    {"AnOffsetBeyondTheFile", "tensor 'w' extent", [](auto& b) { one_tensor(b, {8}, 0, 96); }},
    {"AnOffsetThatWraps", "tensor 'w' extent", [](auto& b) { one_tensor(b, {8}, 0, ~31ull); }},
    {"NoData", "tensor 'w' extent: expected within the 0 bytes",
     [](auto& b) { b.header(1, 0).tensor("w", {8}, 0, 0); }},
    {"AnOverlap", "tensor 'w' offset: expected to start after tensor 'v' ends, got an overlap",
     [](auto& b) { b.header(2, 0).tensor("w", {8}, 0, 32).tensor("v", {9}, 0, 0).data(128); }},
};
INSTANTIATE_TEST_SUITE_P(Gguf, GgufRefuses, testing::ValuesIn(kRefusals),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Gguf, KeepsControlCharactersOutOfItsMessages) {
  GgufBuilder b;
  b.header(0, 1).scalar<uint8_t>("a\x1b[2J\n", 99, 1);
  try {
    parse(b);
    FAIL() << "parsed";
  } catch (const GgufError& error) {
    EXPECT_NE(std::string(error.what()).find("metadata 'a?[2J?'"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace motet
