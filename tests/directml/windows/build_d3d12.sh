#!/bin/sh
# build_d3d12.sh SOURCES OUTPUT: compiles d3d12.c of this folder with vkd3d out of Wine's SOURCES. Runs in the Debian system.
# Debian's own d3d12.dll is vkd3d, too, but without DXIL, the form of all of DirectML's shaders.
set -e
here=$(cd "$(dirname "$0")" && pwd)
vkd3d=$1/libs/vkd3d output=$2 mingw=x86_64-w64-mingw32-gcc
mkdir -p objects include/wine
cd objects

# Wine's headers of Direct3D beside mingw's of Windows: each expects the other parts to be its own.
windows=/usr/include/wine/wine/windows
cp $windows/d3d*.h $windows/dxgi*.h ../include/
cp "$1"/include/wine/list.h "$1"/include/wine/rbtree.h ../include/wine/
cp -r /usr/include/vulkan /usr/include/vk_video ../include/
cp "$vkd3d"/include/vulkan/* ../include/vulkan/
echo '#include <vulkan/vulkan.h>' > ../include/wine/vulkan.h
# The compiler of HLSL wants two enumerations out of d3dx9shader.h, which needs these names.
cat > ../include/d3dx9.h <<TYPES
#include <d3d9.h>
#define DECL_WINELIB_TYPE_AW(type)
typedef void ID3DXBuffer, *D3DXVECTOR4, *D3DXMATRIX;
TYPES
# Where Wine's headers leave a union without a name, its sources call it u.
{
    echo '#include <windows.h>'
    for n in '' 1 2 3 4 5 6 7 8; do
        printf '#undef __C89_NAMELESSUNIONNAME%s\n#define __C89_NAMELESSUNIONNAME%s u%s\n' "$n" "$n" "$n"
    done
} > ../include/unions.h

bison -d -Wno-other -o hlsl.tab.c "$vkd3d"/libs/vkd3d-shader/hlsl.y
bison -d -Wno-other -o preproc.tab.c "$vkd3d"/libs/vkd3d-shader/preproc.y
flex -o hlsl.yy.c "$vkd3d"/libs/vkd3d-shader/hlsl.l
flex -o preproc.yy.c "$vkd3d"/libs/vkd3d-shader/preproc.l
cat > flags <<FLAGS
-O1 -w -c -DCOBJMACROS -D_WIN32_WINNT=0x0a00 -include ../include/unions.h
-DVKD3D_SHADER_UNSUPPORTED_DXIL -DLIBVKD3D_SOURCE -DLIBVKD3D_SHADER_SOURCE -DLIBVKD3D_UTILS_SOURCE
-I. -I../include -I$vkd3d -I$vkd3d/include -I$vkd3d/include/private -I$vkd3d/libs/vkd3d -I$vkd3d/libs/vkd3d-shader
FLAGS
ls "$vkd3d"/libs/*/*.c ./*.c "$here"/d3d12.c | xargs -P "$(nproc)" -n 1 $mingw @flags
$mingw -shared -static -o "$output" ./*.o "$here"/d3d12.def -luuid -ldxguid
