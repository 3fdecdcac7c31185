// Heads of 65 to 128 channels.
#define KEYS 128
#include "wkv7.h"
