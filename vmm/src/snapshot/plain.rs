//! Structures of the kernel as bytes.

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};

use super::codec::{Invalid, Reader, Writer};

/// A structure that is nothing but its bytes.
///
/// # Safety
/// It is made of integers, has no padding that is not a field, and any bytes are a value of it.
pub unsafe trait Plain: Copy + Default {}

// SAFETY: `#[repr(C)]` of integers; the bindings name all padding.
unsafe impl Plain for kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_sregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_xcrs {}
// SAFETY: as above.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_lapic_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_vcpu_events {}
// SAFETY: as above.
unsafe impl Plain for kvm_clock_data {}
// SAFETY: as above.
unsafe impl Plain for kvm_cpuid_entry2 {}

/// Writes the bytes of `value`.
pub fn write<T: Plain>(to: &mut Writer, value: &T) {
    // SAFETY: the pointer is to a value of that size, all of which is initialised (`Plain`).
    to.raw(unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) });
}

/// Reads a value.
///
/// # Errors
/// There are too few bytes.
pub fn read<T: Plain>(from: &mut Reader<'_>, what: &'static str) -> Result<T, Invalid> {
    let bytes = from.raw(what, size_of::<T>())?;
    // SAFETY: there are as many bytes as the structure has, any of them are a value of it (`Plain`), and the read does not
    // need alignment.
    Ok(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast::<T>()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_structure_survives_its_bytes_and_keeps_its_layout() {
        let regs = kvm_regs { rax: 1, rip: 2, rflags: 3, ..Default::default() };
        let mut writer = Writer::new();
        write(&mut writer, &regs);
        let bytes = writer.into_bytes();
        assert_eq!((bytes.len(), bytes[0], bytes[128], bytes[136]), (144, 1, 2, 3));
        assert_eq!(read::<kvm_regs>(&mut Reader::new(&bytes), "regs"), Ok(regs));
        assert!(read::<kvm_sregs>(&mut Reader::new(&bytes), "sregs").is_err());
    }

    #[test]
    fn sizes_are_those_of_the_format() {
        let sizes = [
            size_of::<kvm_regs>(),
            size_of::<kvm_sregs>(),
            size_of::<kvm_xcrs>(),
            size_of::<kvm_debugregs>(),
            size_of::<kvm_lapic_state>(),
            size_of::<kvm_vcpu_events>(),
            size_of::<kvm_clock_data>(),
            size_of::<kvm_cpuid_entry2>(),
        ];
        assert_eq!(sizes, [144, 312, 392, 128, 1024, 64, 48, 40]);
    }
}
