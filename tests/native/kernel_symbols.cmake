# Fails when a kernel object defines a weak function: the linker keeps one copy of those for the whole program, and the
# scalar path would run into AVX-512 instructions. Run as: cmake -DNM=nm -DOBJECTS=a.o,b.o -P kernel_symbols.cmake
string(REPLACE "," ";" objects "${OBJECTS}")
list(LENGTH objects num_objects)
if(num_objects EQUAL 0)
  message(FATAL_ERROR "no kernel objects given")
endif()
foreach(object ${objects})
  execute_process(COMMAND ${NM} --defined-only --demangle ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9a-f]+ [WVu] [^\n]*" weak "${symbols}")
  if(weak)
    message(SEND_ERROR "${object} defines weak symbols: ${weak}")
  endif()
endforeach()
