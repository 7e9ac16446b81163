;; The products of the model, four numbers at a time: the same as `Weights.slow` and `attend` in layers.js.
;; wat2wasm of wabt assembles this file into matmul.wasm.
;;
;; Addresses and steps from row to row are in bytes; x_rows, w_rows and v_rows are such steps. T tokens, S tokens seen,
;; I inputs, O outputs, d width of a head.
(module
  (import "js" "memory" (memory 1))

  ;; n numbers of int8 at $from → float32 at $to, 16 at a time
  (func $widen8 (param $from i32) (param $to i32) (param $n i32)
    (local $end i32) (local $v v128) (local $low v128) (local $high v128)
    (local.set $end (i32.add (local.get $from) (local.get $n)))
    (loop $next
      (local.set $v (v128.load (local.get $from)))
      (local.set $low (i16x8.extend_low_i8x16_s (local.get $v)))
      (local.set $high (i16x8.extend_high_i8x16_s (local.get $v)))
      (v128.store (local.get $to) (f32x4.convert_i32x4_s (i32x4.extend_low_i16x8_s (local.get $low))))
      (v128.store offset=16 (local.get $to) (f32x4.convert_i32x4_s (i32x4.extend_high_i16x8_s (local.get $low))))
      (v128.store offset=32 (local.get $to) (f32x4.convert_i32x4_s (i32x4.extend_low_i16x8_s (local.get $high))))
      (v128.store offset=48 (local.get $to) (f32x4.convert_i32x4_s (i32x4.extend_high_i16x8_s (local.get $high))))
      (local.set $to (i32.add (local.get $to) (i32.const 64)))
      (br_if $next (i32.lt_u (local.tee $from (i32.add (local.get $from) (i32.const 16))) (local.get $end)))))

  ;; the same for fp16, 4 at a time: sign, exponent and fraction move to where float32 has them; 2^112 is the difference
  ;; of the exponent biases
  (func $widen16 (param $from i32) (param $to i32) (param $n i32)
    (local $end i32)
    (local.set $end (i32.add (local.get $from) (i32.shl (local.get $n) (i32.const 1))))
    (loop $next
      (v128.store (local.get $to) (f32x4.mul
        (v128.and (i32x4.shl (v128.load16x4_s (local.get $from)) (i32.const 13))
          (v128.const i32x4 0x8fffe000 0x8fffe000 0x8fffe000 0x8fffe000))
        (v128.const f32x4 0x1p112 0x1p112 0x1p112 0x1p112)))
      (local.set $to (i32.add (local.get $to) (i32.const 16)))
      (br_if $next (i32.lt_u (local.tee $from (i32.add (local.get $from) (i32.const 8))) (local.get $end)))))

  ;; the dot products of n numbers at $x with those of four rows at $w
  (func $dot (param $x i32) (param $w i32) (param $w_rows i32) (param $n i32) (result v128)
    (local $end i32) (local $v v128) (local $a v128) (local $b v128) (local $c v128) (local $d v128)
    (local $w1 i32) (local $w2 i32) (local $w3 i32)
    (local.set $end (i32.add (local.get $x) (i32.shl (local.get $n) (i32.const 2))))
    (local.set $w1 (i32.add (local.get $w) (local.get $w_rows)))
    (local.set $w2 (i32.add (local.get $w1) (local.get $w_rows)))
    (local.set $w3 (i32.add (local.get $w2) (local.get $w_rows)))
    (loop $next
      (local.set $v (v128.load (local.get $x)))
      (local.set $a (f32x4.add (local.get $a) (f32x4.mul (local.get $v) (v128.load (local.get $w)))))
      (local.set $b (f32x4.add (local.get $b) (f32x4.mul (local.get $v) (v128.load (local.get $w1)))))
      (local.set $c (f32x4.add (local.get $c) (f32x4.mul (local.get $v) (v128.load (local.get $w2)))))
      (local.set $d (f32x4.add (local.get $d) (f32x4.mul (local.get $v) (v128.load (local.get $w3)))))
      (local.set $w (i32.add (local.get $w) (i32.const 16)))
      (local.set $w1 (i32.add (local.get $w1) (i32.const 16)))
      (local.set $w2 (i32.add (local.get $w2) (i32.const 16)))
      (local.set $w3 (i32.add (local.get $w3) (i32.const 16)))
      (br_if $next (i32.lt_u (local.tee $x (i32.add (local.get $x) (i32.const 16))) (local.get $end))))
    ;; each of the four holds four partial sums: a0 b0 a1 b1 + a2 b2 a3 b3, likewise c and d, then even + odd
    (local.set $a (f32x4.add
      (i8x16.shuffle 0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23 (local.get $a) (local.get $b))
      (i8x16.shuffle 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31 (local.get $a) (local.get $b))))
    (local.set $c (f32x4.add
      (i8x16.shuffle 0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23 (local.get $c) (local.get $d))
      (i8x16.shuffle 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31 (local.get $c) (local.get $d))))
    (f32x4.add
      (i8x16.shuffle 0 1 2 3 4 5 6 7 16 17 18 19 20 21 22 23 (local.get $a) (local.get $c))
      (i8x16.shuffle 8 9 10 11 12 13 14 15 24 25 26 27 28 29 30 31 (local.get $a) (local.get $c))))

  ;; x (T, I) · w (O, I)ᵀ → y (T, O), each output times its scale, if $scales is not 0. w is of $bytes: 4, float32, or 2
  ;; or 1, without gaps: then four rows are widened into $wide, once for all tokens. I is a multiple of 4; O at least 4,
  ;; as the last four rows may be some that are done already.
  (func (export "matmul") (param $x i32) (param $x_rows i32) (param $w i32) (param $w_rows i32) (param $bytes i32)
      (param $scales i32) (param $wide i32) (param $y i32) (param $T i32) (param $I i32) (param $O i32)
    (local $o i32) (local $t i32) (local $rows i32) (local $at i32) (local $step i32) (local $sum v128)
    (local.set $step (local.get $w_rows))
    (if (i32.lt_u (local.get $bytes) (i32.const 4)) (then (local.set $step (i32.shl (local.get $I) (i32.const 2)))))
    (loop $next
      (if (i32.gt_u (i32.add (local.get $o) (i32.const 4)) (local.get $O))
        (then (local.set $o (i32.sub (local.get $O) (i32.const 4)))))
      (local.set $rows (i32.add (local.get $w) (i32.mul (local.get $o) (local.get $w_rows))))
      (if (i32.eq (local.get $bytes) (i32.const 1))
        (then (call $widen8 (local.get $rows) (local.get $wide) (local.get $step))))
      (if (i32.eq (local.get $bytes) (i32.const 2))
        (then (call $widen16 (local.get $rows) (local.get $wide) (local.get $step))))
      (if (i32.lt_u (local.get $bytes) (i32.const 4)) (then (local.set $rows (local.get $wide))))
      (local.set $t (i32.const 0))
      (local.set $at (i32.add (local.get $y) (i32.shl (local.get $o) (i32.const 2))))
      (loop $tokens
        (local.set $sum (call $dot (i32.add (local.get $x) (i32.mul (local.get $t) (local.get $x_rows)))
          (local.get $rows) (local.get $step) (local.get $I)))
        (if (local.get $scales)
          (then (local.set $sum (f32x4.mul (local.get $sum)
            (v128.load (i32.add (local.get $scales) (i32.shl (local.get $o) (i32.const 2))))))))
        (v128.store (local.get $at) (local.get $sum))
        (local.set $at (i32.add (local.get $at) (i32.shl (local.get $O) (i32.const 2))))
        (br_if $tokens (i32.lt_u (local.tee $t (i32.add (local.get $t) (i32.const 1))) (local.get $T))))
      (br_if $next (i32.lt_u (local.tee $o (i32.add (local.get $o) (i32.const 4))) (local.get $O)))))

  ;; x (S) · v (S, d) → y (d), all float32; d is a multiple of 8
  (func (export "mix") (param $x i32) (param $v i32) (param $v_rows i32) (param $y i32) (param $S i32) (param $d i32)
    (local $at i32) (local $row i32) (local $end i32) (local $last i32)
    (local $share v128) (local $a v128) (local $b v128)
    (local.set $end (i32.add (local.get $x) (i32.shl (local.get $S) (i32.const 2))))
    (local.set $last (i32.add (local.get $y) (i32.shl (local.get $d) (i32.const 2))))
    (loop $next
      (local.set $a (v128.const i32x4 0 0 0 0))
      (local.set $b (v128.const i32x4 0 0 0 0))
      (local.set $row (local.get $v))
      (local.set $at (local.get $x))
      (loop $seen
        (local.set $share (v128.load32_splat (local.get $at)))
        (local.set $a (f32x4.add (local.get $a) (f32x4.mul (local.get $share) (v128.load (local.get $row)))))
        (local.set $b (f32x4.add (local.get $b) (f32x4.mul (local.get $share) (v128.load offset=16 (local.get $row)))))
        (local.set $row (i32.add (local.get $row) (local.get $v_rows)))
        (br_if $seen (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 4))) (local.get $end))))
      (v128.store (local.get $y) (local.get $a))
      (v128.store offset=16 (local.get $y) (local.get $b))
      (local.set $v (i32.add (local.get $v) (i32.const 32)))
      (br_if $next (i32.lt_u (local.tee $y (i32.add (local.get $y) (i32.const 32))) (local.get $last))))))
