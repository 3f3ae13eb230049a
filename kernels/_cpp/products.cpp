// The products of products.h, which several operations use.
#include "products.h"

namespace moelab {

MOELAB_PRODUCT(float);
MOELAB_PRODUCT(BFloat16);

}  // namespace moelab
