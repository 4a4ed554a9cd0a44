//! The cache: what fits, what is refused, what a shorter one forgets.

use super::*;
use nibble_kernels::KernelError;
use nibble_kernels::ops::{KvCache, KvKind};

#[test]
fn a_cache_fills_to_its_capacity_and_refuses_more() {
    let ops = Ops::new(&POOLS[1]);
    for kind in [KvKind::F32, KvKind::F16, KvKind::Int8] {
        let mut cache = KvCache::new(kind, 2, 8, 5);
        assert_eq!((cache.kind(), cache.kv_heads(), cache.head_dim()), (kind, 2, 8));
        assert_eq!((cache.len(), cache.capacity(), cache.is_empty()), (0, 5, true));
        assert_eq!(ops.append(&mut cache, &[], &[]), Ok(()), "no rows are no error");
        assert_eq!(ops.append(&mut cache, &[1.0; 3 * 16], &[1.0; 3 * 16]), Ok(()));
        // 16 positions would fit the panels, but were not asked for.
        let full = KernelError::Length { what: "kv cache", found: 5, wanted: 6 };
        assert_eq!(ops.append(&mut cache, &[1.0; 3 * 16], &[1.0; 3 * 16]), Err(full));
        let uneven = KernelError::Length { what: "appended keys", found: 17, wanted: 16 };
        assert_eq!(ops.append(&mut cache, &[1.0; 17], &[1.0; 16]), Err(uneven));
        let values = KernelError::Length { what: "appended values", found: 32, wanted: 16 };
        assert_eq!(ops.append(&mut cache, &[1.0; 16], &[1.0; 32]), Err(values));
        assert_eq!(cache.len(), 3, "a refused append leaves the cache as it was");
        assert_eq!(ops.append(&mut cache, &[1.0; 2 * 16], &[1.0; 2 * 16]), Ok(()));
        assert_eq!(cache.len(), 5);
        cache.truncate(9);
        assert_eq!(cache.len(), 5);
        cache.truncate(1);
        assert_eq!(cache.len(), 1);
    }
}

#[test]
fn its_bytes_are_those_of_its_numbers() {
    // 3 heads, 72 values (keys) and 80 (values, padded to vectors), 1008 positions (1000, padded).
    assert_eq!(KvCache::new(KvKind::F32, 3, 72, 1000).bytes(), 4 * 3 * (72 + 80) * 1008);
    assert_eq!(KvCache::new(KvKind::F16, 3, 72, 1000).bytes(), 2 * 3 * (72 + 80) * 1008);
    assert_eq!(KvCache::new(KvKind::Int8, 3, 72, 1000).bytes(), 3 * (72 + 80 + 2 * 4) * 1008);
}
