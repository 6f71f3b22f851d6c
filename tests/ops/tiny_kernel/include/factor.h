#pragma once
constexpr float FACTOR = 3.0f;
