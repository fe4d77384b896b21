//! Numbers of ioctls as the C library takes them: an int in musl, an unsigned long in glibc, which fuzz targets use. The kernel
//! looks at 32 bits of them.

/// The C library's type for ioctl `number`.
#[allow(
    clippy::as_conversions,
    clippy::cast_possible_wrap,
    clippy::cast_lossless,
    reason = "the type depends on the C library; all 32 bits are kept"
)]
pub const fn number(number: u32) -> libc::Ioctl {
    number as libc::Ioctl
}
