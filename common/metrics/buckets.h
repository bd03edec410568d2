// Histogram bounds, chosen once so that every histogram of one quantity can be compared and added. vLLM's sets start at
// 10 ms (inter-token) and 300 ms (queue, prefill), too coarse for what this server does in between; these start far
// lower.
#pragma once

namespace nibble {

// Seconds between two tokens of a stream, and per-request means of it.
inline constexpr double kTokenBuckets[] = {0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025,
                                           0.03,   0.04,  0.05,   0.075, 0.1,    0.15, 0.2,   0.3,  0.4,
                                           0.5,    0.75,  1,      2.5,   5,      10,   20,    40};

// Seconds a request waits for something: first token, queue, prefill.
inline constexpr double kLatencyBuckets[] = {0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25,
                                             0.5,   0.75,   1,     2.5,  5,    7.5,  10,   20,   40,   80,  160,  640};

// Seconds a whole request or its decode phase takes.
inline constexpr double kRequestBuckets[] = {0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1,   1.5, 2,   2.5, 5,
                                             10,   15,    20,   30,  40,  50,  60,  120, 240, 480, 960, 1920};

// Seconds of one step or of a part of one: from control-plane microseconds to a long prefill.
inline constexpr double kStepBuckets[] = {0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001,
                                          0.0025,  0.005,    0.01,    0.02,   0.03,    0.05,   0.075,
                                          0.1,     0.15,     0.25,    0.5,    1,       2.5,    5};

// Counts of tokens, rows or requests.
inline constexpr double kCountBuckets[] = {1,   2,    4,    8,    16,   32,    64,    128,   256,
                                           512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072};

}  // namespace nibble
