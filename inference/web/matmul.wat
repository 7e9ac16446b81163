;; The products of all layers, four numbers at a time: y = x · wᵀ, what engine.js does in plain JavaScript too.
;; Assembled into matmul.wasm (wat2wasm of wabt); addresses are bytes, T rows of x, I columns, O rows of w.
(module
  (import "js" "memory" (memory 1))

  ;; n numbers of 1 byte (int8) or 2 (fp16) at $from → float32 at $to
  (func $widen (param $from i32) (param $bytes i32) (param $to i32) (param $n i32)
    (local $end i32) (local $v v128)
    (local.set $end (i32.add (local.get $to) (i32.shl (local.get $n) (i32.const 2))))
    (loop $next
      (if (i32.eq (local.get $bytes) (i32.const 1))
        (then (local.set $v (f32x4.convert_i32x4_s
          (i32x4.extend_low_i16x8_s (i16x8.extend_low_i8x16_s (v128.load32_zero (local.get $from)))))))
        (else ;; exponent and fraction to where float32 has them, times 2^112, as its exponents begin there; the sign
          (local.set $v (v128.load16x4_u (local.get $from)))
          (local.set $v (v128.or
            (f32x4.mul
              (i32x4.shl (v128.and (local.get $v) (v128.const i32x4 0x7fff 0x7fff 0x7fff 0x7fff)) (i32.const 13))
              (v128.const f32x4 0x1p112 0x1p112 0x1p112 0x1p112))
            (i32x4.shl (v128.and (local.get $v) (v128.const i32x4 0x8000 0x8000 0x8000 0x8000)) (i32.const 16))))))
      (v128.store (local.get $to) (local.get $v))
      (local.set $from (i32.add (local.get $from) (i32.shl (local.get $bytes) (i32.const 2))))
      (br_if $next (i32.lt_u (local.tee $to (i32.add (local.get $to) (i32.const 16))) (local.get $end)))))

  ;; the dot products of a row of x with four rows of w, which stand $row bytes apart
  (func $dot (param $x i32) (param $w i32) (param $row i32) (result v128)
    (local $end i32) (local $v v128) (local $a v128) (local $b v128) (local $c v128) (local $d v128)
    (local $w1 i32) (local $w2 i32) (local $w3 i32)
    (local.set $end (i32.add (local.get $x) (local.get $row)))
    (local.set $w1 (i32.add (local.get $w) (local.get $row)))
    (local.set $w2 (i32.add (local.get $w1) (local.get $row)))
    (local.set $w3 (i32.add (local.get $w2) (local.get $row)))
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
    (local.set $v (f32x4.add
      (i8x16.shuffle 0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23 (local.get $a) (local.get $b))
      (i8x16.shuffle 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31 (local.get $a) (local.get $b))))
    (local.set $c (f32x4.add
      (i8x16.shuffle 0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23 (local.get $c) (local.get $d))
      (i8x16.shuffle 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31 (local.get $c) (local.get $d))))
    (f32x4.add
      (i8x16.shuffle 0 1 2 3 4 5 6 7 16 17 18 19 20 21 22 23 (local.get $v) (local.get $c))
      (i8x16.shuffle 8 9 10 11 12 13 14 15 24 25 26 27 28 29 30 31 (local.get $v) (local.get $c))))

  ;; x (T, I) · w (O, I)ᵀ → y (T, O), all float32 but w; each row of int8 times its scale. I is a multiple of 4, O at
  ;; least 4: the last four rows may be some that are done already. $wide: room for four rows of float32.
  (func (export "matmul") (param $x i32) (param $w i32) (param $bytes i32) (param $scales i32) (param $wide i32)
      (param $y i32) (param $T i32) (param $I i32) (param $O i32)
    (local $o i32) (local $t i32) (local $row i32) (local $sum v128)
    (local.set $row (i32.shl (local.get $I) (i32.const 2)))
    (loop $rows
      (if (i32.gt_u (i32.add (local.get $o) (i32.const 4)) (local.get $O))
        (then (local.set $o (i32.sub (local.get $O) (i32.const 4)))))
      (call $widen ;; once for all tokens
        (i32.add (local.get $w) (i32.mul (i32.mul (local.get $o) (local.get $I)) (local.get $bytes)))
        (local.get $bytes) (local.get $wide) (local.get $row))
      (local.set $t (i32.const 0))
      (loop $tokens
        (local.set $sum (call $dot
          (i32.add (local.get $x) (i32.mul (local.get $t) (local.get $row))) (local.get $wide) (local.get $row)))
        (if (i32.eq (local.get $bytes) (i32.const 1))
          (then (local.set $sum (f32x4.mul (local.get $sum)
            (v128.load (i32.add (local.get $scales) (i32.shl (local.get $o) (i32.const 2))))))))
        (v128.store
          (i32.add (local.get $y) (i32.shl (i32.add (i32.mul (local.get $t) (local.get $O)) (local.get $o)) (i32.const 2)))
          (local.get $sum))
        (br_if $tokens (i32.lt_u (local.tee $t (i32.add (local.get $t) (i32.const 1))) (local.get $T))))
      (br_if $rows (i32.lt_u (local.tee $o (i32.add (local.get $o) (i32.const 4))) (local.get $O))))))
