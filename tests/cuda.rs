//! The GPU's kernels without a GPU: every launch is interpreted from the PTX that ships, with races, misplaced accesses
//! and reads of unwritten memory as errors, and held to sums in double precision. With the feature `cuda` the same laws
//! run on this machine's GPU as well, if it has one.

mod attention;
mod choice;
mod few;
mod fused;
mod linear;
mod model;
mod probe;
mod rows;
mod violations;

use crate::ptx::Machine;
use nibble_kernels::cuda::{Cuda, DeviceRows, Gpu};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Makes the operations on a device, with so many processors where that can be chosen.
type Device<'a, G> = &'a dyn Fn(u32) -> Cuda<G>;

/// The operations on an interpreted device.
fn interpreted(processors: u32) -> Cuda<Machine> {
    Cuda::new(Machine::new(processors)).expect("the interpreter has memory")
}

/// The same on one whose warps multiply four together.
fn with_warpgroups(processors: u32) -> Cuda<Machine> {
    Cuda::new(Machine::new(processors).with_warpgroups()).expect("the interpreter has memory")
}

/// Each law as a test on the interpreter, and as one on a GPU.
macro_rules! laws {
    ($($module:ident :: $law:ident,)*) => {
        $(#[test]
        fn $law() {
            $module::$law(&interpreted);
        })*

        #[cfg(feature = "cuda")]
        mod on_a_gpu {
            $(#[test]
            fn $law() {
                if super::has_gpu() {
                    super::$module::$law(&super::real);
                }
            })*
        }
    };
}

laws! {
    linear::products_of_few_rows_are_sums_in_double_precision,
    linear::products_of_few_rows_with_very_many_outputs,
    linear::products_of_many_rows_are_sums_in_double_precision,
    linear::a_long_prompt_and_parts_of_k,
    linear::hostile_rows_of_activations_keep_their_magnitude,
    linear::unquantized_weights_are_multiplied_in_single_precision,
    linear::embeddings_are_the_rows_that_products_read,
    linear::unfit_products_are_refused,
    rows::norms_divide_rows_and_heads_by_their_root_mean_square,
    rows::rotation_turns_pairs_and_leaves_the_rest,
    rows::gates_sums_and_caps_are_their_formulas,
    choice::choices_are_the_first_of_the_largest,
    choice::the_largest_few_are_sorted_and_all_are_weighed,
    choice::penalties_are_the_hosts_to_the_last_bit,
    rows::selected_rows_are_copies,
    probe::the_doctors_products_are_right,
    attention::attention_is_softmax_of_scores_times_values,
    attention::unfit_caches_are_refused,
    attention::a_decoded_token_is_turned_appended_and_attended_at_once,
    few::norms_before_products_need_no_launch,
    few::gates_after_products_need_no_launch,
    fused::products_together_are_products_apart,
    fused::norms_and_gates_leave_rows_ready_for_products,
    fused::rows_that_change_are_made_ready_again,
    fused::turning_and_appending_at_once_is_both,
    model::a_tiny_model_of_each_family_speaks_as_on_the_cpu,
    model::a_long_prompt_is_read_as_on_the_cpu,
    model::every_way_to_store_weights_and_keys_speaks_as_on_the_cpu,
    model::only_the_choice_comes_back_from_the_device,
    model::tokens_are_drawn_as_from_the_hosts_copy_of_the_logits,
}

/// The laws of what differs where four warps multiply together.
macro_rules! laws_of_warpgroups {
    ($($module:ident :: $law:ident,)*) => {
        mod warpgroups {
            $(#[test]
            fn $law() {
                super::$module::$law(&super::with_warpgroups);
            })*
        }
    };
}

laws_of_warpgroups! {
    linear::products_of_many_rows_are_sums_in_double_precision,
    linear::a_long_prompt_and_parts_of_k,
    fused::norms_and_gates_leave_rows_ready_for_products,
    model::a_long_prompt_is_read_as_on_the_cpu,
}

/// The operations on this machine's first GPU.
#[cfg(feature = "cuda")]
fn real(_: u32) -> Cuda<nibble_kernels::cuda::driver::Driver> {
    let driver = nibble_kernels::cuda::driver::Driver::open(0).expect("the GPU was there a moment ago");
    Cuda::new(driver).expect("the GPU has memory")
}

/// Whether there is one; says so if not, and fails where `NIBBLE_STRICT_GPU` asks for one.
#[cfg(feature = "cuda")]
fn has_gpu() -> bool {
    match nibble_kernels::cuda::driver::Driver::open(0) {
        Ok(_) => true,
        Err(why) => {
            eprintln!("skipped: no CUDA device: {why}");
            assert!(std::env::var_os("NIBBLE_STRICT_GPU").is_none(), "a GPU is asked for: {why}");
            false
        }
    }
}

fn random(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Numbers around zero.
fn numbers(random: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len).map(|_| random.random_range(-1.0f32..1.0)).collect()
}

/// Rows on the device that hold `values`.
fn rows_of<G: Gpu>(cuda: &Cuda<G>, values: &[f32], width: usize) -> DeviceRows<G::Memory> {
    let rows = cuda.rows(values.len() / width, width).expect("there is room");
    cuda.write_rows(&rows, values).expect("they fit");
    rows
}
