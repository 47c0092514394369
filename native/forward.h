#pragma once

#include "model.h"

namespace slingshot {
namespace LEVEL {

template <class T> void forward(Model<T>& model, const Step& step);

}  // namespace LEVEL
}  // namespace slingshot
