// Heads of up to 64 channels.
#define KEYS 64
#include "wkv7.h"
