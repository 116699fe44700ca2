#include "machine.h"

#include <algorithm>
#include <cctype>
#include <fstream>

#include "cpu/isa.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace patchgen_fast::native {
namespace {

#if defined(__APPLE__)
int64_t sysctl_value(const char* name) {
  int64_t value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 ? value : 0;
}
#else
std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

int64_t parse_size(const std::string& text) {  // "1024K", "32M", "64"
  int64_t value = 0;
  for (const char c : text) {
    if (c >= '0' && c <= '9') {
      value = value * 10 + (c - '0');
    } else if (c == 'K') {
      value <<= 10;
    } else if (c == 'M') {
      value <<= 20;
    }
  }
  return value;
}

int count_cpus(const std::string& list) {  // "0-3,8,10-11"
  int count = 0;
  for (size_t at = 0; at < list.size();) {
    const size_t comma = std::min(list.find(',', at), list.size());
    const std::string part = list.substr(at, comma - at);
    const size_t dash = part.find('-');
    const int first = static_cast<int>(parse_size(part.substr(0, dash)));
    const int last =
        dash == std::string::npos ? first : static_cast<int>(parse_size(part.substr(dash + 1)));
    count += last - first + 1;
    at = comma + 1;
  }
  return count;
}
#endif

}  // namespace

std::vector<Cache> caches() {
  std::vector<Cache> found;
#if defined(__APPLE__)
  const int64_t line = sysctl_value("hw.cachelinesize");
  const std::pair<int, const char*> levels[] = {
      {1, "hw.l1dcachesize"}, {2, "hw.l2cachesize"}, {3, "hw.l3cachesize"}};
  for (const auto& [level, name] : levels) {
    if (const int64_t bytes = sysctl_value(name); bytes > 0) {
      found.push_back({level, level == 1 ? "data" : "unified", bytes, line, 0});
    }
  }
#else
  for (int index = 0;; ++index) {
    const std::string folder =
        "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    const std::string level = first_line(folder + "level");
    if (level.empty()) {
      break;
    }
    std::string type = first_line(folder + "type");
    std::transform(type.begin(), type.end(), type.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    if (type == "instruction") {
      continue;
    }
    found.push_back({static_cast<int>(parse_size(level)), type,
                     parse_size(first_line(folder + "size")),
                     parse_size(first_line(folder + "coherency_line_size")),
                     count_cpus(first_line(folder + "shared_cpu_list"))});
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const Cache& a, const Cache& b) { return a.level < b.level; });
#endif
  return found;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
#if defined(__x86_64__)
#define PATCHGEN_FAST_FEATURE(name)   \
  if (__builtin_cpu_supports(name)) { \
    names.push_back(name);            \
  }
  PATCHGEN_FAST_FEATURE("sse4.2")
  PATCHGEN_FAST_FEATURE("avx")
  PATCHGEN_FAST_FEATURE("avx2")
  PATCHGEN_FAST_FEATURE("fma")
  if (has_f16c()) {
    names.push_back("f16c");
  }
  PATCHGEN_FAST_FEATURE("avx512f")
  PATCHGEN_FAST_FEATURE("avx512bw")
  PATCHGEN_FAST_FEATURE("avx512dq")
  PATCHGEN_FAST_FEATURE("avx512vl")
  PATCHGEN_FAST_FEATURE("avx512vbmi")
  PATCHGEN_FAST_FEATURE("avx512vnni")
  PATCHGEN_FAST_FEATURE("avx512bf16")
#undef PATCHGEN_FAST_FEATURE
#elif defined(__linux__) && defined(__aarch64__)
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  const struct {
    unsigned long word;
    int bit;
    const char* name;
  } features[] = {{first, 1, "asimd"}, {first, 20, "asimddp"}, {first, 10, "asimdhp"},
                  {first, 22, "sve"},  {second, 1, "sve2"},    {second, 14, "bf16"},
                  {second, 13, "i8mm"}};
  for (const auto& feature : features) {
    if ((feature.word >> feature.bit) & 1UL) {
      names.push_back(feature.name);
    }
  }
#elif defined(__aarch64__)
  names.push_back("asimd");
#endif
  return names;
}

}  // namespace patchgen_fast::native
