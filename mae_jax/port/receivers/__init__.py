"""The models of the libraries that receive our weights, each fed with images and mask noise like ours."""
