//! `NIBBLE_LAWS=quick`: fewer cases of the laws that have many, for a CPU that is emulated and takes a hundred times as
//! long. Every kernel, every instruction set and every kind of input stays.

/// Whether laws are to be quick.
pub fn quick() -> bool {
    match std::env::var("NIBBLE_LAWS").as_deref() {
        Ok("quick") => true,
        Err(_) | Ok("") => false,
        Ok(other) => panic!("NIBBLE_LAWS is `{other}`, not `quick`"),
    }
}

/// The cases, or one of `every` if laws are to be quick. A prime number visits all values of a short inner loop.
pub fn thin<T>(every: usize, cases: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
    cases.into_iter().step_by(if quick() { every } else { 1 })
}
