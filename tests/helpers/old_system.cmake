# For a wheel that is to run on older systems than the one that builds it: links with the C and C++ libraries of the system in
# the folder SPECDEC_OLD_SYSTEM (docs/development.md). CMAKE_TOOLCHAIN_FILE names this file (package.py).
set(OLD $ENV{SPECDEC_OLD_SYSTEM})
cmake_host_system_information(RESULT PROCESSOR QUERY OS_PLATFORM)
set(PLATFORM ${PROCESSOR}-linux-gnu)
# They come first, so that whatever else names them later has them already.
add_link_options(-Wl,--sysroot=${OLD} -L${OLD}/lib/${PLATFORM} -L${OLD}/usr/lib/${PLATFORM}
  -Wl,--no-as-needed -l:libstdc++.so.6 -l:libpthread.so.0 -l:libdl.so.2 -l:librt.so.1 -Wl,--as-needed)
# What the C++ library of that time has not becomes part of each library.
foreach(language CXX CUDA)
  set(CMAKE_${language}_STANDARD_LIBRARIES "${CMAKE_CURRENT_LIST_DIR}/old_system.cpp -l:libstdc++.a")
endforeach()
