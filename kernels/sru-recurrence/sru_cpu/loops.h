// What is compiled for each instruction set, by every_instruction_set.h.

#include "lanes.h"
#include "../include/sru_step.h"
#include "scan_rows.h"
#include "scan.h"
#include "scan_backward.h"
