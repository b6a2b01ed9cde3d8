// SPDX-License-Identifier: MIT
// Callgrind's requests as functions that Python can call: what is counted lies between the two.
#include <valgrind/callgrind.h>

void count_begin(void) {
  CALLGRIND_START_INSTRUMENTATION;
  CALLGRIND_ZERO_STATS;
}

// Writes the counts to a file of its own, described by `name`.
void count_end(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
