#pragma once

#include "model.h"

namespace slingshot {
namespace LEVEL {

template <class T> void forward(Model<T>& model, const Step& step);

// The step of one sequence, with its draws and the module's guesses.
template <class T> void run_chain(Model<T>& model, Chain& chain);

}  // namespace LEVEL
}  // namespace slingshot
