// SPDX-License-Identifier: Apache-2.0
// Labels of any kind as dense ids by first appearance. With the bindings, the only code that knows Python objects.
#pragma once
#include <Python.h>

#include <cstdint>

namespace rlkern {

// ids (n), order (n), counts (groups) and offsets (groups + 1), as GroupIndex has them (rlkern/types.py).
struct LabelGroups {
  int64_t *ids, *order, *counts, *offsets;
  int64_t groups;
};

// Labels as rlkern/group.py hands them down: a list, a tuple, or a 1-D array of a dtype in its table. `memory` holds
// 4 n + 1 numbers. False: a Python exception is set.
bool group_labels(PyObject* labels, int64_t n, int64_t* memory, LabelGroups& out);

}  // namespace rlkern
