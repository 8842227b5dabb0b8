// Names of symbols that are compiled once per instruction set: FASTGUARD_CONCAT(name_,
// FASTGUARD_CAPABILITY).
#pragma once

#define FASTGUARD_CONCAT_(a, b) a##b
#define FASTGUARD_CONCAT(a, b) FASTGUARD_CONCAT_(a, b)
