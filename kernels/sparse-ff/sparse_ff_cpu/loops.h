// What is compiled for each instruction set, by every_instruction_set.h.

#include "lanes.h"
#include "exponential.h"
#include "winner.h"
#include "numbers.h"
#include "rows.h"
