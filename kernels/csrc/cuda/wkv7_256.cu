// Heads of 129 to 256 channels.
#define KEYS 256
#include "wkv7.h"
