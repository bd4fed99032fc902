// Replaces libFuzzer if there is no clang: it changes the seeds at random, without using coverage.
// It accepts those of libFuzzer's arguments that tools/fuzz.py uses:
//
//   decoder -max_total_time=SECONDS -artifact_prefix=FOLDER/ CORPUS_FOLDER...   fuzzes
//   decoder FILE...                                                            replays
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* message, std::size_t size);

// Every failure calls the death callback, including an abort and an uncaught exception.
extern "C" const char* __asan_default_options() { return "handle_abort=1"; }

namespace {

namespace fs = std::filesystem;
using Bytes = std::vector<std::uint8_t>;

std::string artifact_prefix;  // NOLINT: read by the death callback, which takes no argument
Bytes current;

void save_current() {
  const std::string path = artifact_prefix + "crash-decoder";
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(current.data()),
             static_cast<std::streamsize>(current.size()));
  std::fprintf(stderr, "Test unit written to %s\n", path.c_str());
}

// Copied to memory of its exact size, so that the sanitizer finds a read past the end.
void execute(const Bytes& input) {
  current = input;
  const std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[input.size()]);
  std::copy(input.begin(), input.end(), exact.get());
  LLVMFuzzerTestOneInput(exact.get(), input.size());
}

Bytes read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

class Mutator {
 public:
  explicit Mutator(const std::vector<Bytes>& seeds) : seeds_(seeds) {}

  Bytes next() {
    Bytes bytes = pick(seeds_);
    for (std::size_t changes = 1 + below(8); changes > 0; --changes) change(bytes);
    return bytes;
  }

 private:
  std::size_t below(std::size_t limit) { return random_() % limit; }

  template <typename List>
  const typename List::value_type& pick(const List& list) {
    return list[below(list.size())];
  }

  void change(Bytes& bytes) {
    static const Bytes edges{0x00, 0x01, 0x02, 0x0a, 0x10, 0x12, 0x18, 0x1a, 0x2a, 0x7f, 0x80, 0xff};
    const std::size_t at = below(bytes.size() + 1);
    const auto where = bytes.begin() + static_cast<std::ptrdiff_t>(at);
    const std::size_t left = bytes.size() - at;
    switch (below(5)) {
      case 0:
        if (left > 0) *where = static_cast<std::uint8_t>(random_());
        return;
      case 1:
        if (left > 0) *where = pick(edges);
        return;
      case 2:
        bytes.insert(where, pick(edges));
        return;
      case 3:
        bytes.erase(where, where + static_cast<std::ptrdiff_t>(std::min(left, below(9))));
        return;
      default: {
        const Bytes& other = pick(seeds_);
        const std::size_t begin = below(other.size() + 1);
        const std::size_t end = begin + std::min(other.size() - begin, below(33));
        bytes.insert(where, other.begin() + static_cast<std::ptrdiff_t>(begin),
                     other.begin() + static_cast<std::ptrdiff_t>(end));
      }
    }
  }

  const std::vector<Bytes>& seeds_;
  std::mt19937_64 random_{std::random_device{}()};
};

void fuzz(const std::vector<Bytes>& seeds, int seconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  for (const Bytes& seed : seeds) execute(seed);
  Mutator mutator(seeds);
  std::uint64_t runs = seeds.size();
  // The clock is read only now and then, because reading it takes longer than one execution.
  while (runs % 1024 != 0 || std::chrono::steady_clock::now() < end) {
    execute(mutator.next());
    ++runs;
  }
  std::fprintf(stderr, "Done %llu runs in %d second(s)\n", static_cast<unsigned long long>(runs),
               seconds);
}

}  // namespace

int main(int count, char** arguments) {
  int seconds = 0;
  std::vector<Bytes> inputs;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument.rfind("-max_total_time=", 0) == 0) {
      seconds = std::atoi(argument.c_str() + std::strlen("-max_total_time="));
    } else if (argument.rfind("-artifact_prefix=", 0) == 0) {
      artifact_prefix = argument.substr(std::strlen("-artifact_prefix="));
    } else if (argument[0] == '-') {
      continue;  // another option of libFuzzer
    } else if (fs::is_directory(argument)) {
      for (const auto& file : fs::directory_iterator(argument)) {
        inputs.push_back(read_file(file.path()));
      }
    } else {
      inputs.push_back(read_file(argument));
    }
  }
  if (seconds == 0) {
    for (const Bytes& input : inputs) execute(input);
    return 0;
  }
  __sanitizer_set_death_callback(save_current);
  inputs.emplace_back();  // at least one, an empty message
  fuzz(inputs, seconds);
  return 0;
}
